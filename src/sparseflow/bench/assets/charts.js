// The charts of a benchmark.

const PHASES = ["pack", "prescan", "compute", "neuron", "rest"];

/** Colour of a kernel; where the palette is used up, it starts again with dotted symbols and dashed lines. */
function look(kernel) {
  const index = kernels.indexOf(kernel);
  const round = Math.floor(index / results.palette.length);
  return { colour: results.palette[index % results.palette.length], dash: ["solid", "dash", "dot"][Math.min(round, 2)], dotted: round > 0 };
}

function symbol(point) {
  const open = point.source === MEASURED ? "" : "-open";
  return SHAPES[point.scope] + open + (look(point.kernel).dotted ? "-dot" : "");
}

/** A legend's marks have the shape of the kernel's scope, as the points have. */
function kernelEntries(points) {
  return distinct(points.map((point) => point.kernel)).map((kernel) => [{ ...look(kernel), dash: null, shape: shapeOf(kernel) }, kernel]);
}

const shapeOf = (kernel) => SHAPES[results.points.find((point) => point.kernel === kernel).scope];
const lineEntries = (names) => names.map((kernel) => [{ ...look(kernel), shape: shapeOf(kernel) }, kernel]);

function markEntries(points) {
  const neutral = { colour: css("--muted") };
  const scopes = distinct(points.map((point) => point.scope));
  const entries = scopes.map((scope) => [{ ...neutral, shape: SHAPES[scope] }, scope]);
  if (points.some((point) => point.source !== MEASURED)) entries.push([{ ...neutral, open: true }, "published elsewhere, not measured here"]);
  const dishonest = distinct(points.filter(isDishonest).map((point) => point.baseline));
  if (dishonest.length) entries.push([{ ...neutral, faded: true }, `faded: baseline not honest (${dishonest.join(", ")})`]);
  return entries;
}

/** The axis of ratios, always with 1 in it; a narrow range has finer ticks than a wide one. */
function ratioAxis(title, values, text = (tick) => `${tick}x`) {
  const [low, high] = [Math.min(1, ...values) / 1.2, Math.max(1, ...values) * 1.2];
  const steps = high / low > 12 ? [1, 2, 5] : [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8];
  const powers = [-4, -3, -2, -1, 0, 1, 2, 3, 4];
  const ticks = powers.flatMap((power) => steps.map((step) => +(step * 10 ** power).toPrecision(2))).filter((tick) => tick >= low && tick <= high);
  return { type: "log", title: { text: title, standoff: 10 }, range: [Math.log10(low), Math.log10(high)], tickvals: ticks, ticktext: ticks.map(text) };
}

/** Break-even, and the side of it where we win. */
function evenLine(axis, above = true) {
  const edge = 10 ** axis.range[above ? 1 : 0];
  const across = { xref: "paper", x0: 0, x1: 1, yref: "y" };
  return [
    { type: "rect", ...across, y0: 1, y1: edge, fillcolor: css("--win"), line: { width: 0 }, layer: "below" },
    { type: "line", ...across, y0: 1, y1: 1, line: { color: css("--even"), width: 1.2 } },
  ];
}

function hover(point) {
  const density = point.rho === null ? "" : `density ${share(point.rho)}`;
  const honesty = isDishonest(point) ? "not honest: not the strongest dense path of the same precision" : "";
  return lines(
    `${point.case}: ${point.kernel} (${point.scope}, ${point.precision}, ${point.device})`,
    [configText(point.config), density].filter(Boolean).join(", "),
    `${figure(point.value[1])} ${point.unit} (${range(point.value)})`,
    `${point.baseline}: ${figure(point.baseline_value[1])} ${point.unit} (${range(point.baseline_value)})`,
    `speedup ${times(point.speedup[1])} (${range(point.speedup)})`,
    honesty,
    point.source === MEASURED ? "" : `published: ${point.source}`,
  );
}

/** Points of one kernel, scope and honesty as marks with error bars. */
function marks(points, x, ratio = (point) => point.speedup) {
  const groups = groupBy(points, (point) => JSON.stringify([point.kernel, symbol(point), isDishonest(point)]));
  return [...groups.values()].map((members) => {
    const { colour } = look(members[0].kernel);
    const [low, middle, high] = [0, 1, 2].map((i) => members.map((point) => ratio(point)[i]));
    return {
      type: "scatter", mode: "markers", name: plain(members[0].kernel), x: members.map(x), y: middle,
      text: members.map(hover), hoverinfo: "text", opacity: isDishonest(members[0]) ? FADED : 0.9,
      marker: { color: colour, size: 8, symbol: symbol(members[0]), line: { width: symbol(members[0]).includes("-open") ? 1.6 : 0.6, color: symbol(members[0]).includes("-open") ? colour : css("--page") } },
      error_y: {
        type: "data", symmetric: false, color: colour, thickness: 1, width: 0,
        array: high.map((value, i) => value - middle[i]), arrayminus: middle.map((value, i) => value - low[i]),
      },
    };
  });
}

/** x of a point at its size, moved a little by its kernel, so that kernels at one size stand side by side. */
function sideBySide(points, scale) {
  const sizes = sizesOf(points, scale);
  const gap = Math.min(2, ...sizes.slice(1).map((size, i) => size / sizes[i]));
  const names = new Map([...groupBy(points, (point) => sizeOf(point, scale))].map(([size, members]) => [size, distinct(members.map((point) => point.kernel))]));
  const widest = Math.max(...[...names.values()].map((kernelsThere) => kernelsThere.length));
  return (point) => {
    const there = names.get(sizeOf(point, scale));
    return sizeOf(point, scale) * gap ** ((0.6 * (there.indexOf(point.kernel) - (there.length - 1) / 2)) / Math.max(widest, 4));
  };
}

const wins = (points) => points.filter((point) => point.speedup[1] > 1).length;

function extremes(points) {
  const values = points.map((point) => point.speedup[1]);
  return `${times(Math.min(...values))} to ${times(Math.max(...values))}`;
}

const ONE_METRIC = "Choose one metric to draw: a time and a memory share no axis.";

function whyEmpty(points, chosen) {
  if (chosen.metric === ANY) return ONE_METRIC;
  if (points.length) return `None of the ${count(points.length, "selected point")} has a ${chosen.scale} and a speedup; they are in the table of every point.`;
  const hidden = results.points.filter((point) => isDishonest(point) && passes(point, { ...chosen, dishonest: true })).length;
  const more = hidden && !chosen.dishonest ? ` ${count(hidden, "point")} would if their baseline were honest.` : "";
  return `No point passes the filters above.${more}`;
}

/** Which baselines the speedups of a chart are over. */
function over(points) {
  return ` Over ${[...groupBy(points, (point) => point.baseline)].map(([name, members]) => `${name} (${members.length})`).join(", ")}.`;
}

// ---- the charts ----------------------------------------------------------------------------------------------------------

/** 1, and the chart of approximate methods: speedup against the scale parameter. */
function drawScale(id, points, chosen) {
  const shown = points.filter((point) => point.speedup && sizeOf(point, chosen.scale) !== null);
  if (!shown.length || chosen.metric === ANY) return leaveEmpty(id, whyEmpty(points, chosen));
  const x = logAxis(chosen.scale, shown.map((point) => sizeOf(point, chosen.scale)), String, { pad: 1.5 });
  const y = ratioAxis(`speedup (${chosen.metric})`, shown.flatMap((point) => point.speedup));
  draw(
    id,
    marks(shown, sideBySide(shown, chosen.scale)),
    layoutOf(x, y, { shapes: evenLine(y) }),
    `${count(shown.length, "point")}: ${wins(shown)} above break-even, ${shown.length - wins(shown)} not; medians from ${extremes(shown)}.${over(shown)}` +
      leftOut(points.length - shown.length, `without a ${chosen.scale} or without a baseline`),
  );
  return setLegend(figureOf(id).legend, [...kernelEntries(shown), ...markEntries(shown)]);
}

const leftOut = (number, why) => (number ? ` ${count(number, "selected point")} ${why}: only in the table.` : "");

/** 2: one line a kernel. Returns the rows of the table below it. */
function drawSizes(points, chosen) {
  const series = chosen.metric === ANY ? [] : seriesOf(points, chosen.scale);
  if (!series.length) {
    leaveEmpty("sizes", chosen.metric === ANY ? ONE_METRIC : `No kernel has two runs that differ in nothing but ${chosen.scale}.`);
    return [];
  }
  const rows = [...groupBy(series, lineKey).values()].map((members) => {
    const [{ kernel, scope }] = members[0];
    return { ...kernelLine(members, chosen.scale), kernel, scope, dishonest: isDishonest(members[0][0]) };
  });
  const thin = series.map((members) => lineTrace(members[0], meanLine(members, chosen.scale), { width: 1, opacity: 0.35 }));
  const thick = rows.map((row) => lineTrace(row, row.line, { width: 2.5, opacity: row.dishonest ? FADED : 1, marker: 7 }));
  const all = [...series.flat().map((point) => point.speedup[1])];
  const x = logAxis(chosen.scale, series.flat().map((point) => sizeOf(point, chosen.scale)), String);
  const y = ratioAxis(`speedup (${chosen.metric})`, all);
  const trends = ["rising", "flat", "falling"].map((name) => `${rows.filter((row) => trend(row.factor) === name).length} ${name}`);
  draw("sizes", [...thin, ...thick], layoutOf(x, y, { shapes: evenLine(y) }), `${count(rows.length, "line")} over ${chosen.scale}: ${trends.join(", ")}.${over(series.flat())}`);
  setLegend(figureOf("sizes").legend, [...lineEntries(distinct(rows.map((row) => row.kernel))), ...markEntries(series.flat())]);
  return rows;
}

const lineKey = ([point]) => JSON.stringify([point.kernel, point.scope, isDishonest(point)]);

function lineTrace({ kernel, scope, used, of }, line, { width, opacity, marker = 0 }) {
  const { colour, dash } = look(kernel);
  return {
    type: "scatter", mode: marker ? "lines+markers" : "lines", name: plain(kernel), opacity,
    x: line.map(([size]) => size), y: line.map(([, speedup]) => speedup),
    line: { color: colour, width, dash }, marker: { size: marker, symbol: SHAPES[scope], color: colour },
    text: line.map(([size, speedup]) => lines(`${kernel} (${scope})`, `at ${size}: ${times(speedup)}`, used ? `mean over ${used} of ${of} series` : "one series")),
    hoverinfo: "text",
  };
}

/** 3: one density sweep with its crossovers. */
function drawSweep(sweep, chosen) {
  if (!sweep) return leaveEmpty("density", "No selected case was run at three densities or more.");
  const { members } = sweep;
  const positive = members.map((point) => point.rho).filter((rho) => rho > 0);
  const silent = Math.min(...positive) / 2; // where a density of zero stands on a logarithmic axis
  const at = (rho) => 100 * (rho > 0 ? rho : silent);
  const lined = [...groupBy(members, (point) => JSON.stringify([point.kernel, point.baseline]))].map(([, points]) => {
    const { colour, dash } = look(points[0].kernel);
    const sorted = [...points].sort((a, b) => a.rho - b.rho);
    const line = { color: colour, width: 1.5, dash };
    return { type: "scatter", mode: "lines", x: sorted.map((p) => at(p.rho)), y: sorted.map((p) => p.speedup[1]), line, hoverinfo: "skip", opacity: isDishonest(points[0]) ? FADED : 1 };
  });
  const crossovers = crossoversOf(sweep, chosen);
  const ticks = crossovers.flatMap((crossover) => crossoverMarks(crossover, at));
  const named = members.map((point) => at(point.rho));
  const x = logAxis("density of the input (%)", [...named, ...ticks.map((tick) => tick.x[0])], String, { named });
  x.ticktext = x.tickvals.map((value) => (value === 100 * silent && members.some((point) => !point.rho) ? "0" : String(+value.toPrecision(2))));
  const y = ratioAxis(`speedup (${members[0].metric})`, members.flatMap((point) => point.speedup));
  draw(
    "density",
    [...lined, ...marks(members, (point) => at(point.rho)), ...ticks],
    layoutOf(x, y, { shapes: evenLine(y) }),
    `${sweep.title}: ${count(members.length, "point")}, speedups from ${extremes(members)}; ` +
      `${crossovers.length ? `${count(crossovers.length, "crossover")} recorded` : "no crossover recorded"}.${over(members)}`,
  );
  const neutral = css("--muted");
  const entries = [[{ colour: neutral, shape: "tick" }, "crossover measured here"], [{ colour: neutral, shape: "triangle-down", open: true }, "crossover the dispatcher uses"]];
  return setLegend(figureOf("density").legend, [...lineEntries(distinct(members.map((point) => point.kernel))), ...markEntries(members), ...(crossovers.length ? entries : [])]);
}

function crossoverMarks({ kernel, measured, used }, at) {
  const { colour } = look(kernel);
  const mark = (value, name, marker) => ({
    type: "scatter", mode: "markers", x: [at(value)], y: [1], name, hoverinfo: "text", cliponaxis: false,
    text: [lines(`${kernel}: crossover ${name}`, share(value))], marker: { color: colour, ...marker },
  });
  const found = [];
  if (measured !== null) found.push(mark(measured, "measured here", { symbol: "line-ns-open", size: 22, line: { width: 3, color: colour } }));
  if (used !== null) found.push(mark(used, "the dispatcher uses", { symbol: "triangle-down-open", size: 13, line: { width: 2, color: colour } }));
  return found;
}

/** 4: our memory over the dense run's. */
function drawMemory(points) {
  const shown = points.filter((point) => point.speedup && sizeOf(point, "width") !== null);
  if (!shown.length) return leaveEmpty("memory", points.length ? "None of the selected memory points has a width and a baseline." : "No memory point passes the filters above.");
  const fraction = (point) => [...point.speedup].reverse().map((value) => 1 / value);
  const x = logAxis("width", shown.map((point) => sizeOf(point, "width")), String, { pad: 1.5 });
  const y = ratioAxis("memory over the dense run", shown.flatMap(fraction), (tick) => `${+(100 * tick).toPrecision(2)} %`);
  const joined = seriesOf(shown, "width").map((members) => lineTrace(members[0], meanLine(members, "width").map(([size, gain]) => [size, 1 / gain]), { width: 1.5, opacity: isDishonest(members[0]) ? FADED : 0.7 }));
  const less = shown.filter((point) => point.speedup[1] > 1).length;
  draw(
    "memory",
    [...joined.map((trace) => ({ ...trace, hoverinfo: "skip" })), ...marks(shown, (point) => sizeOf(point, "width"), fraction)],
    layoutOf(x, y, { shapes: evenLine(y, false) }),
    `${count(shown.length, "point")}: ${less} with less memory than the dense run, ${shown.length - less} not.${over(shown)}` + leftOut(points.length - shown.length, "without a width or a baseline"),
  );
  return setLegend(figureOf("memory").legend, [...lineEntries(distinct(shown.map((point) => point.kernel))), ...markEntries(shown)]);
}

/** 5: shares of one call, a bar a case and kernel. */
function drawPhases(chosen) {
  const phases = results.phases.filter((phase) => chosen.kernels.has(phase.kernel));
  if (!phases.length) return leaveEmpty("phases", results.phases.length ? "No selected kernel has a phase breakdown." : "This run recorded no phases.");
  const bars = [...groupBy(phases, (phase) => JSON.stringify([phase.case, phase.kernel])).values()].reverse();
  const total = (bar) => bar.reduce((sum, phase) => sum + phase.ms, 0);
  const msOf = (bar, name) => bar.filter((phase) => phase.phase === name).reduce((sum, phase) => sum + phase.ms, 0);
  const names = distinct([...PHASES, ...phases.map((phase) => phase.phase)]);
  const colours = Object.fromEntries(names.map((name, i) => [name, name === "rest" ? results.grey : results.palette[i % results.palette.length]]));
  const traces = names.map((name) => ({
    type: "bar", orientation: "h", name: plain(name), marker: { color: colours[name], line: { color: css("--page"), width: 1 } },
    x: bars.map((bar) => (100 * msOf(bar, name)) / total(bar)), y: bars.map((_, i) => i), width: 0.45, hoverinfo: "text", textposition: "none",
    text: bars.map((bar) => lines(`${name}: ${figure(msOf(bar, name))} ms of ${figure(total(bar))} ms`)),
  }));
  const annotations = bars.map((bar, i) => ({
    x: 0, xanchor: "left", y: i + 0.24, yanchor: "bottom", yref: "y", xref: "paper", showarrow: false, align: "left",
    text: plain(`${bar[0].case}, ${bar[0].kernel}: ${figure(total(bar))} ms`),
  }));
  const y = { showticklabels: false, showgrid: false, range: [-0.4, bars.length - 0.4], fixedrange: true };
  const x = { title: { text: "share of one call (%)" }, range: [0, 100], showgrid: false };
  const largest = bars.map((bar) => names.reduce((a, b) => (msOf(bar, b) > msOf(bar, a) ? b : a)));
  draw("phases", traces, layoutOf(x, y, { barmode: "stack", annotations, height: 80 + 56 * bars.length }), `${count(bars.length, "call")}; the largest phase is ${distinct(largest).join(" or ")}.`);
  return setLegend(figureOf("phases").legend, names.map((name) => [{ colour: colours[name], shape: "square" }, name]));
}
