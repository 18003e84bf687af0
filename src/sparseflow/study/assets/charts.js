// The charts of a study.

const NEAR = 0.15; // of a prediction: the dotted lines
const VERDICT_COLOURS = { holds: "--good", opposite: "--loss", "does not hold": "--text", "cannot be said": "--muted" };

const verdictColour = (verdict) => css(VERDICT_COLOURS[verdict]);

/** An axis for positive values: logarithmic where they span more than a factor of four. */
function valueAxis(label, values) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  if (!(low > 0) || high / low < 4) return { title: { text: label }, nticks: isNarrow() ? 4 : 8 };
  const steps = high / low > 60 ? [1] : high / low > 12 ? [1, 3] : [1, 2, 5];
  const powers = Array.from({ length: 24 }, (_, i) => i - 9);
  const ticks = powers.flatMap((power) => steps.map((step) => +(step * 10 ** power).toPrecision(2)));
  return { type: "log", title: { text: label }, tickvals: ticks, ticktext: ticks.map(shortNumber), range: [Math.log10(low) - 0.06, Math.log10(high) + 0.06] };
}

/** 1200000 is 1.2M. */
function shortNumber(value) {
  const [divisor, letter] = value >= 1e9 ? [1e9, "G"] : value >= 1e6 ? [1e6, "M"] : value >= 1e4 ? [1e3, "k"] : [1, ""];
  return `${+(value / divisor).toPrecision(3)}${letter}`;
}

const legendOf = (chosen, nets) => {
  const values = valuesOf(chosen);
  return values.filter((value) => nets.some((net) => net[chosen.colour] === value)).map((value) => [look(value, values), value]);
};

function hover(net, ...more) {
  const front = net.fronts.length ? `on the front of ${net.fronts.join(", ")}` : "";
  return lines(title(net), details(net), ...more, front);
}

/** Rows from above, each with its name over it, on a narrow screen in two lines: positions, axis and names. */
function rowsOf(names) {
  const positions = names.map((_, i) => names.length - 1 - i);
  const annotations = names.map((name, i) => ({
    x: 0, xanchor: "left", xref: "paper", y: positions[i] + 0.14, yanchor: "bottom", yref: "y", showarrow: false, align: "left",
    text: isNarrow() ? plain(name).replace(": ", ":<br>") : plain(name),
  }));
  const axis = { showticklabels: false, showgrid: false, range: [-0.45, names.length - 0.25], fixedrange: true };
  return { positions, axis, annotations, height: 90 + (isNarrow() ? 58 : 40) * names.length };
}

const zeroLine = () => ({ type: "line", xref: "x", x0: 0, x1: 0, yref: "paper", y0: 0, y1: 1, line: { color: css("--even"), width: 1.2 } });

/** Ends of an interval as a plotly error bar around a value. */
const bars = (values, intervals, colour) => ({
  type: "data", symmetric: false, color: colour, thickness: 1.5, width: 3,
  array: values.map((value, i) => (intervals[i] ? intervals[i][1] - value : 0)),
  arrayminus: values.map((value, i) => (intervals[i] ? value - intervals[i][0] : 0)),
});

/** 1: changes found, and changes published. */
function drawFindings(chosen) {
  const judged = results.findings.filter((finding) => finding.dataset === chosen.dataset && finding.published_value !== null && finding.estimate !== null);
  if (!judged.length) return leaveEmpty("findings", "No two networks of this dataset can be compared: nothing to draw.");
  const { positions, axis, annotations, height } = rowsOf(judged.map((finding) => finding.name));
  const traces = judged.map((finding, i) => ({
    type: "scatter", mode: "markers", x: [finding.estimate], y: [positions[i]], hoverinfo: "text",
    text: [lines(finding.name, `${signed(finding.estimate)} ${finding.unit}: ${finding.verdict}`, `published: ${finding.published}`)],
    marker: { color: verdictColour(finding.verdict), size: 10 },
    error_x: bars([finding.estimate], [finding.interval], verdictColour(finding.verdict)),
  }));
  traces.push({
    type: "scatter", mode: "markers", x: judged.map((finding) => finding.published_value), y: positions, hoverinfo: "text",
    text: judged.map((finding) => lines(finding.name, `published: ${finding.published}`)), marker: { color: css("--muted"), size: 11, symbol: "diamond-open", line: { width: 1.5 } },
  });
  const x = { title: { text: "change (%; of accuracy: points)" } };
  const counts = [...groupBy(judged, (finding) => finding.verdict)].map(([verdict, members]) => `${verdict} ${members.length}`);
  draw("findings", traces, layoutOf(x, axis, { annotations, height, shapes: [zeroLine()] }), `${chosen.dataset}, ${count(judged.length, "effect")}: ${counts.join(", ")}.`);
  const verdicts = distinct(judged.map((finding) => finding.verdict)).map((verdict) => [{ colour: verdictColour(verdict) }, verdict]);
  return setLegend(figureOf("findings").legend, [...verdicts, [{ colour: css("--muted"), shape: "diamond", open: true }, "published"]]);
}

/** 2: one point a network, and the Pareto front. */
function drawFront(chosen) {
  const nets = ofDataset(chosen);
  const shown = nets.filter((net) => net.status === COMPLETE && isMeasured(net, ACCURACY) && isMeasured(net, chosen.cost));
  if (!shown.length) return leaveEmpty("front", `No network of this dataset has an accuracy and ${chosen.cost}.${leftOut(nets, shown)}`);
  const cost = (net) => net[chosen.cost];
  const front = shown.filter((net) => net.fronts.includes(chosen.cost)).sort((a, b) => cost(a) - cost(b));
  const line = {
    type: "scatter", mode: "lines", x: front.map(cost), y: front.map((net) => 100 * net.accuracy), hoverinfo: "skip",
    line: { color: css("--text"), width: 1.5, shape: "hv" },
  };
  const values = valuesOf(chosen);
  const traces = [...groupBy(shown, (net) => net[chosen.colour])].map(([value, members]) => pointTrace(members, look(value, values), chosen));
  const y = { title: { text: "accuracy (%)" } };
  const ends = `${outcomeText(cost(front[0]), chosen.cost)} with ${share(front[0].accuracy)} to ${outcomeText(cost(front.at(-1)), chosen.cost)} with ${share(front.at(-1).accuracy)}`;
  draw(
    "front",
    [line, ...traces],
    layoutOf(valueAxis(`${chosen.cost} (${unitOf(chosen.cost)})`, shown.map(cost)), y),
    `${count(shown.length, "network")}, ${front.length} on the front: ${ends}.${leftOut(nets, shown)}`,
  );
  const frontEntry = [{ colour: css("--text"), shape: "circle", open: true }, "on the front"];
  return setLegend(figureOf("front").legend, [...legendOf(chosen, shown), frontEntry]);
}

function pointTrace(members, { colour, shape }, { cost }) {
  const onFront = members.map((net) => net.fronts.includes(cost));
  const quantiles = members.map((net) => net.latency[PATHS_OF[cost]] ?? null);
  return {
    type: "scatter", mode: "markers", x: members.map((net) => net[cost]), y: members.map((net) => 100 * net.accuracy), hoverinfo: "text",
    text: members.map((net) => hover(net, `accuracy ${share(net.accuracy)}, ${cost} ${outcomeText(net[cost], cost)}`)),
    marker: {
      color: colour, symbol: shape, size: onFront.map((on) => (on ? 11 : 8)), opacity: 0.85,
      line: { color: onFront.map((on) => (on ? css("--text") : css("--page"))), width: onFront.map((on) => (on ? 1.6 : 0.6)) },
    },
    error_x: { ...bars(members.map((net) => net[cost]), quantiles.map((q) => q && [q[0], q[2]]), colour), thickness: 1, width: 0 },
  };
}

/** 3: a line a network, and the mean of every colour. */
function drawDensity(chosen) {
  const nets = ofDataset(chosen);
  const shown = nets.filter((net) => net.status === COMPLETE && net.layers.length);
  if (!shown.length) return leaveEmpty("density", `No network of this dataset has layers.${leftOut(nets, shown)}`);
  const values = valuesOf(chosen);
  const deepest = shown.reduce((a, b) => (b.layers.length > a.layers.length ? b : a)).layers;
  const groups = [...groupBy(shown, (net) => net[chosen.colour])];
  const thin = shown.map((net) => layerTrace(net.layers.map((layer) => layer.density), look(net[chosen.colour], values), { width: 1, opacity: 0.3 }, (layer, i) => hover(net, `${net.layers[i].name}: ${share(net.layers[i].density)}`)));
  const thick = groups.map(([value, members]) => {
    const means = meanDensities(members);
    return layerTrace(means, look(value, values), { width: 3, opacity: 1 }, (layer, i) => lines(value, `layer ${i + 1}: ${share(means[i])}, mean of ${members.length}`));
  });
  const x = { tickvals: deepest.map((_, i) => i), ticktext: deepest.map((layer) => plain(layer.name)), range: [-0.3, deepest.length - 0.7] };
  const y = { title: { text: "density of the input (%)" }, rangemode: "tozero" };
  const last = groups.map(([value, members]) => `${value} ${share(meanDensities(members).reduce((a, b) => a + b, 0) / meanDensities(members).length)}`);
  draw("density", [...thin, ...thick], layoutOf(x, y), `${count(shown.length, "network")}. Mean over the layers: ${last.join(", ")}.${leftOut(nets, shown)}`);
  return setLegend(figureOf("density").legend, legendOf(chosen, shown));
}

function meanDensities(members) {
  const depth = Math.max(...members.map((net) => net.layers.length));
  return Array.from({ length: depth }, (_, i) => {
    const there = members.filter((net) => net.layers.length > i).map((net) => net.layers[i].density);
    return there.reduce((a, b) => a + b, 0) / there.length;
  });
}

const layerTrace = (densities, { colour, shape }, { width, opacity }, text) => ({
  type: "scatter", mode: width > 1 ? "lines+markers" : "lines", opacity, x: densities.map((_, i) => i), y: densities.map((density) => 100 * density),
  line: { color: colour, width }, marker: { color: colour, symbol: shape, size: 8 }, text: densities.map(text), hoverinfo: "text",
});

/** 4: means or changes, a row a value. */
function drawEffects(chosen) {
  const shown = effectsOf(chosen).filter((effect) => effect[chosen.effect] !== null);
  if (!shown.length) return leaveEmpty("effects", "No choice varies among the networks of this dataset that have this outcome.");
  const isChange = chosen.effect === "change";
  const scale = !isChange && chosen.outcome === ACCURACY ? 100 : 1;
  const value = (effect) => scale * effect[chosen.effect];
  const interval = (effect) => (isChange ? effect.change_interval : effect.interval)?.map((end) => scale * end) ?? null;
  const positions = effectRows(shown);
  const lowest = Math.min(...positions);
  const traces = [...groupBy(shown.map((effect, i) => [effect, positions[i]]), ([effect]) => effect.parameter)].map(([parameter, members]) => {
    const { colour } = look(parameter, results.parameters);
    const xs = members.map(([effect]) => value(effect));
    return {
      type: "scatter", mode: "markers", x: xs, y: members.map(([, position]) => position), hoverinfo: "text", text: members.map(([effect]) => effectText(effect)),
      marker: { color: colour, size: 9 }, error_x: bars(xs, members.map(([effect]) => interval(effect)), colour),
    };
  });
  const headings = [...groupBy(shown.map((effect, i) => [effect.parameter, positions[i]]), ([parameter]) => parameter)].map(([parameter, [[, position]]]) => ({
    x: 0, xanchor: "left", xref: "paper", y: position + 0.95, yanchor: "middle", yref: "y", showarrow: false, text: `<b>${plain(parameter)}</b>`,
  }));
  const unit = isChange ? changeUnit(chosen.outcome) : chosen.outcome === ACCURACY ? "%" : unitOf(chosen.outcome);
  const x = { title: { text: `${isChange ? "change of " : ""}${chosen.outcome} (${unit})` }, nticks: isNarrow() ? 5 : 10 };
  const y = { tickvals: positions, ticktext: shown.map((effect) => plain(effect.value)), showgrid: false, range: [lowest - 0.6, 1.6], fixedrange: true };
  const more = { annotations: headings, height: 80 + 23 * (2 - lowest), shapes: isChange ? [zeroLine()] : [] };
  return draw("effects", traces, layoutOf(x, y, more), `${chosen.dataset}: ${largestEffect(chosen)}`);
}

const effectsOf = ({ dataset, outcome }) => results.effects.filter((effect) => effect.dataset === dataset && effect.outcome === outcome);

/** A row each from 0 downwards, with a free one above every parameter for its name. */
function effectRows(shown) {
  let row = 1;
  return shown.map((effect, i) => {
    row -= i > 0 && effect.parameter !== shown[i - 1].parameter ? 2 : 1;
    return row;
  });
}

function effectText(effect) {
  const change = effect.change === null ? "no network differs in this only" : `change ${changeText(effect)}, ${count(effect.pairs, "pair")}`;
  return lines(`${effect.parameter} ${effect.value}`, `mean ${meanText(effect)}, ${count(effect.nets, "network")}`, change);
}

/** In words: the changes whose interval leaves 0 out, largest first. */
function largestEffect(chosen) {
  const clear = effectsOf(chosen).filter(({ change_interval: ends }) => ends && (ends[0] > 0 || ends[1] < 0));
  if (!clear.length) return `no choice changes ${chosen.outcome} by more than its interval.`;
  const [largest] = clear.sort((a, b) => Math.abs(b.change) - Math.abs(a.change));
  return `${count(clear.length, "change")} of ${chosen.outcome} with an interval that leaves 0 out; the largest: ${largest.parameter} ${largest.value}, ${changeText(largest)}.`;
}

/** 5: predicted against measured. */
function drawPredicted(chosen) {
  const nets = ofDataset(chosen);
  const shown = nets.filter((net) => net.latency[chosen.path] && chosen.path in net.predicted);
  if (!shown.length) return leaveEmpty("predicted", "No network of this dataset was both predicted and measured.");
  const values = valuesOf(chosen);
  const measured = (net) => net.latency[chosen.path][1];
  const predicted = (net) => net.predicted[chosen.path];
  const all = shown.flatMap((net) => [measured(net), predicted(net)]);
  const ends = [Math.min(...all) / 1.1, Math.max(...all) * 1.1];
  const diagonal = (factor, dash) => ({ type: "scatter", mode: "lines", x: ends, y: ends.map((end) => factor * end), hoverinfo: "skip", line: { color: css("--even"), width: 1.2, dash } });
  const traces = [...groupBy(shown, (net) => net[chosen.colour])].map(([value, members]) => {
    const { colour, shape } = look(value, values);
    return {
      type: "scatter", mode: "markers", x: members.map(measured), y: members.map(predicted), hoverinfo: "text",
      text: members.map((net) => hover(net, `measured ${figure(measured(net))} ms, predicted ${figure(predicted(net))} ms`)),
      marker: { color: colour, symbol: shape, size: 8, opacity: 0.85, line: { color: css("--page"), width: 0.6 } },
    };
  });
  const { error } = results.predictions.find((row) => row.dataset === chosen.dataset && row.path === chosen.path);
  const near = shown.filter((net) => Math.abs(predicted(net) / measured(net) - 1) <= NEAR).length;
  const guides = [diagonal(1, "solid"), diagonal(1 - NEAR, "dot"), diagonal(1 + NEAR, "dot")];
  draw(
    "predicted",
    [...guides, ...traces],
    layoutOf(valueAxis(`measured, ${chosen.path} (ms per call)`, ends), valueAxis("predicted (ms per call)", ends)),
    `${count(shown.length, "network")}: median error ${share(error.median)}, 90 % below ${share(error.p90)}; ${near} within 15 %.`,
  );
  return setLegend(figureOf("predicted").legend, legendOf(chosen, shown));
}
