// The tables of a study.

const outcomeColumn = (name, heading = name) => ({
  title: heading, kind: "figure", key: (net) => net[name], cell: (net) => (net[name] === null ? "-" : name === ACCURACY ? share(net[name]) : figure(net[name])),
});

function latencyColumn(path) {
  const quantiles = (net) => net.latency[path] ?? null;
  return { title: path, kind: "figure", key: (net) => quantiles(net)?.[1] ?? null, cell: (net) => quantileCell(quantiles(net), "ms") };
}

const gain = (net) => (net.latency.dense && net.latency.accelerated ? net.latency.dense[1] / net.latency.accelerated[1] : null);
const density = (net) => (net.layers.length ? net.layers.reduce((sum, layer) => sum + layer.density, 0) / net.layers.length : null);
const predictions = (net) => Object.entries(net.predicted);

const showNets = sortableTable(
  document.querySelector("#nets .table"),
  "Every network",
  [
    { title: "network", kind: "net", key: title, cell: (net) => [title(net), small(details(net))] },
    { title: "status", key: (net) => net.status, cell: statusCell },
    outcomeColumn(ACCURACY),
    latencyColumn("accelerated"),
    latencyColumn("dense"),
    { title: "speedup", kind: "figure", key: gain, cell: (net) => (gain(net) === null ? "-" : element("span", { className: gain(net) < 1 ? "loss" : "", text: times(gain(net)) })) },
    outcomeColumn("cycles"),
    outcomeColumn("spikes"),
    { title: "density", kind: "figure", key: density, cell: (net) => share(density(net)) },
    { title: "predicted", kind: "name", key: (net) => predictions(net)[0]?.[1] ?? null, cell: predictedCell },
    { title: "epochs", kind: "figure", key: (net) => net.epochs, cell: (net) => String(net.epochs) },
    { title: "T, batch", kind: "name", key: (net) => net.steps, cell: (net) => `${net.steps}, ${net.batch}` },
    text("dataset", "dataset"),
    { title: "error", kind: "wide", key: (net) => net.error || null, cell: (net) => net.error || "-" },
  ],
  { rowClass: (net) => net.status, empty: "No network passes the filters." },
);

function statusCell(net) {
  if (net.status !== COMPLETE) return tag(net.status);
  return net.fronts.length ? [net.status, small(`front: ${net.fronts.join(", ")}`)] : net.status;
}

function predictedCell(net) {
  return predictions(net).length ? predictions(net).map(([path, ms]) => element("span", { className: "line", text: `${path}: ${figure(ms)} ms` })) : "-";
}

const endsText = (ends, text) => (ends ? `(${ends.map(text).join(" to ")})` : "");
const meanEnds = ({ interval, outcome }) => endsText(interval, (end) => figure(outcome === ACCURACY ? 100 * end : end));
const changeEnds = ({ change_interval: ends }) => endsText(ends, (end) => signed(end));
const meanOf = ({ mean, outcome }) => outcomeText(mean, outcome);
const changeOf = ({ change, outcome }) => (change === null ? "-" : `${signed(change)} ${changeUnit(outcome)}`);
const meanText = (effect) => [meanOf(effect), meanEnds(effect)].join(" ").trim();
const changeText = (effect) => [changeOf(effect), changeEnds(effect)].join(" ").trim();

const showEffects = sortableTable(
  document.querySelector("#effects .table"),
  "Effects",
  [
    text("parameter", "parameter", "name"),
    text("value", "value", "name"),
    { title: "mean", kind: "figure", key: (effect) => effect.mean, cell: (effect) => [meanOf(effect), small(meanEnds(effect))] },
    { title: "change", kind: "figure", key: (effect) => effect.change, cell: (effect) => [changeOf(effect), small(changeEnds(effect))] },
    { title: "networks", kind: "figure", key: (effect) => effect.nets, cell: (effect) => String(effect.nets) },
    { title: "pairs", kind: "figure", key: (effect) => effect.pairs, cell: (effect) => String(effect.pairs) },
  ],
  { empty: "" },
);
