// The tables of a benchmark.

// A speedup stands next to its baseline, and both in front, where a narrow screen shows them.
const POINT_COLUMNS = [
  text("kernel", "kernel", "name"),
  { title: "speedup (range)", kind: "figure", key: (point) => point.speedup?.[1] ?? null, cell: speedupCell },
  { title: "baseline", kind: "name", key: (point) => point.baseline, cell: baselineCell },
  { title: "value (p20-p80)", kind: "figure", key: (point) => point.value?.[1] ?? null, cell: valueCell },
  { title: "config", kind: "wide", key: (point) => point.case, cell: configCell },
  { title: "ρ (density)", kind: "figure", key: (point) => point.rho, cell: (point) => share(point.rho) },
  text("metric", "metric"),
  text("family", "family"),
  text("scope", "scope"),
  { title: "source", key: (point) => point.source, cell: sourceCell },
];

function configCell(point) {
  return [point.case, small([point.suite, configText(point.config)].filter(Boolean).join(": "))];
}

function valueCell(point) {
  return point.gate.green ? quantileCell(point.value, point.unit) : tag("red gate");
}

function speedupCell({ speedup }) {
  if (!speedup) return "-";
  return [element("span", { className: speedup[1] < 1 ? "loss" : "", text: times(speedup[1]) }), small(`(${range(speedup)})`)];
}

function baselineCell(point) {
  const name = isDishonest(point) ? [point.baseline, " ", tag("not honest")] : [point.baseline];
  if (!point.gate.green || !point.baseline_value) return name;
  const [value, spread] = quantileCell(point.baseline_value, point.unit);
  return [...name, small(`${value} ${spread.textContent}`)];
}

function sourceCell(point) {
  const where = small(`${point.device}, ${point.precision}`);
  return point.source === MEASURED ? [MEASURED, where] : [tag("published"), ` ${point.source}`, where];
}

const pointTable = (id, label) =>
  sortableTable(document.querySelector(`#${id} .table`), label, POINT_COLUMNS, {
    rowClass: (point) => (isDishonest(point) ? "dishonest" : point.gate.green ? "" : "red"),
    empty: "No point passes the filters.",
  });

const showPoints = pointTable("points", "Every point");
const showApproximate = pointTable("approximate", "Points of approximate methods");

const ratioCell = (value) => (value === null ? "-" : element("span", { className: value < 1 ? "loss" : "", text: times(value) }));
const gain = (layer) => (layer.dense_ms === null || !layer.sparse_ms ? null : layer.dense_ms / layer.sparse_ms);
const shareColumn = (title, field) => ({ title, kind: "figure", key: (row) => row[field], cell: (row) => share(row[field]) });
const msColumn = (title, field) => ({ title, kind: "figure", key: (row) => row[field], cell: (row) => (row[field] === null ? "-" : `${figure(row[field])} ms`) });

const showLayers = sortableTable(
  document.querySelector("#layers .table"),
  "Layers",
  [
    text("layer", "name", "name"), text("kind", "kind"), shareColumn("density", "density"), shareColumn("occupancy", "occupancy"),
    text("path", "path", "name"), msColumn("dense", "dense_ms"), msColumn("sparse", "sparse_ms"),
    { title: "dense over sparse", kind: "figure", key: gain, cell: (layer) => ratioCell(gain(layer)) },
    text("reason", "reason", "wide"),
  ],
  { empty: "This run recorded no layers of a network." },
);

const showSizes = sortableTable(
  document.querySelector("#sizes .table"),
  "Speedup at the smallest and the largest size",
  [
    { title: "kernel", kind: "name", key: (row) => row.kernel, cell: (row) => (row.dishonest ? [row.kernel, " ", tag("not honest")] : row.kernel) },
    text("scope", "scope"),
    { title: "series", kind: "figure", key: (row) => row.used, cell: (row) => `${row.used} of ${row.of}` },
    { title: "smallest", kind: "figure", key: (row) => row.line[0][1], cell: (row) => sizeCell(row.line[0]) },
    { title: "largest", kind: "figure", key: (row) => row.line.at(-1)[1], cell: (row) => sizeCell(row.line.at(-1)) },
    { title: "per doubling", kind: "figure", key: (row) => row.factor, cell: (row) => times(row.factor) },
    { title: "trend", key: (row) => row.factor, cell: (row) => trend(row.factor) },
  ],
  { rowClass: (row) => (row.dishonest ? "dishonest" : ""), empty: "" },
);

function sizeCell([size, speedup]) {
  return [element("span", { className: speedup < 1 ? "loss" : "", text: times(speedup) }), small(`at ${size}`)];
}

const showCrossovers = sortableTable(
  document.querySelector("#density .table"),
  "Crossovers",
  [
    text("case", "case", "wide"), text("kernel", "kernel", "name"),
    shareColumn("measured here", "measured"), shareColumn("the dispatcher uses", "used"),
    { title: "used - measured", kind: "figure", key: difference, cell: (row) => (difference(row) === null ? "-" : `${(100 * difference(row)).toFixed(1)} points`) },
  ],
  { empty: "No selected kernel has a crossover." },
);

function difference({ measured, used }) {
  return measured === null || used === null ? null : used - measured;
}
