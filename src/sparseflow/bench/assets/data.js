// What of the results is selected, and how it is grouped. No drawing here.

const controls = document.getElementById("controls");
const SCALES = ["width", "resolution", "batch", "T", "depth"];
const SHAPES = { exact: "circle", pruned: "diamond", peer: "triangle-up", approximate: "x" };
const DENSITY_SET = "density set"; // the parameter of a sweep; the density that came out is the point's rho
const MEASURED = "measured";
const ANY = "any";

const kernels = distinct(results.points.map((point) => point.kernel));
const isApproximate = (point) => point.scope === "approximate";
// A point without a baseline's figure compares nothing, so that it cannot flatter.
const isDishonest = (point) => !point.honest && point.speedup !== null;

/** What the controls say. */
function selection() {
  const chosen = Object.fromEntries([...controls.querySelectorAll("select")].map((select) => [select.name, select.value]));
  const ticked = [...document.querySelectorAll("#kernels input:checked")].map((box) => box.value);
  const words = wordsOf(document.querySelector("input[name=text]").value);
  return { ...chosen, dishonest: controls.elements.dishonest.checked, kernels: new Set(ticked), words };
}

/** Whether the filters let a point through; `metric` replaces the chosen one for a chart that has its own. */
function passes(point, chosen, metric = chosen.metric) {
  const fits = (field, wanted) => wanted === ANY || point[field] === wanted;
  return (
    (chosen.dishonest || !isDishonest(point)) &&
    fits("metric", metric) &&
    ["suite", "device", "precision"].every((field) => fits(field, chosen[field])) &&
    (isApproximate(point) || fits("scope", chosen.scope)) &&
    chosen.kernels.has(point.kernel)
  );
}

/** Whether every word of the search occurs somewhere in the point's row. */
function found(point, words) {
  if (!words.length) return true;
  const fields = ["kernel", "family", "scope", "suite", "case", "metric", "baseline", "device", "precision", "source"];
  const text = [...fields.map((field) => point[field]), configText(point.config)].join(" ").toLowerCase();
  return words.every((word) => text.includes(word));
}

const sizeOf = (point, scale) => (typeof point.config[scale] === "number" && point.config[scale] > 0 ? point.config[scale] : null);

/** The configuration as text that is equal for equal configurations, without one of its parameters. */
function configKey(config, without) {
  return JSON.stringify(Object.entries(config).filter(([name]) => name !== without).sort(([a], [b]) => (a < b ? -1 : 1)));
}

/** The density that a run was given: for a network it is an outcome, and so `null`. */
function givenDensity(point) {
  return point.network ? null : point.config[DENSITY_SET] ?? point.rho;
}

/** A case's name without the size it was run at: "resnet18 @64, batch 1" is "resnet18 @#, batch 1" at resolution 64. */
function nameWithout(point, scale) {
  const size = String(sizeOf(point, scale));
  return point.case.replace(/\d+/g, (number) => (number === size ? "#" : number));
}

/** Runs that differ in nothing but `scale`: a list of lists of points, each with two sizes or more. */
function seriesOf(points, scale) {
  const sized = points.filter((point) => point.speedup && point.source === MEASURED && sizeOf(point, scale) !== null);
  const groups = groupBy(sized, (point) =>
    JSON.stringify([
      point.kernel, point.scope, point.suite, nameWithout(point, scale), configKey(point.config, scale),
      givenDensity(point), point.metric, point.baseline, point.precision, point.device,
    ]),
  );
  return [...groups.values()].filter((members) => sizesOf(members, scale).length > 1);
}

const sizesOf = (points, scale) => distinct(points.map((point) => sizeOf(point, scale))).sort((a, b) => a - b);

const geometricMean = (values) => Math.exp(values.reduce((sum, value) => sum + Math.log(value), 0) / values.length);

/** Mean speedup at each size: [[size, speedup], ...]. */
function meanLine(points, scale) {
  return sizesOf(points, scale).map((size) => [
    size,
    geometricMean(points.filter((point) => sizeOf(point, scale) === size).map((point) => point.speedup[1])),
  ]);
}

/**
 * One line for the series of one kernel, over those that share the most common set of sizes: a mean over other cases at
 * every size would rise and fall with the cases.
 */
function kernelLine(series, scale) {
  const bySizes = [...groupBy(series, (members) => sizesOf(members, scale).join()).values()];
  const weight = (group) => group.length * sizesOf(group[0], scale).length;
  const best = bySizes.reduce((a, b) => (weight(b) > weight(a) ? b : a));
  const line = meanLine(best.flat(), scale);
  return { line, used: best.length, of: series.length, factor: perDoubling(line) };
}

/** Factor of the speedup when the size doubles: least squares in log-log. */
function perDoubling(line) {
  const xs = line.map(([size]) => Math.log2(size));
  const ys = line.map(([, speedup]) => Math.log2(speedup));
  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
  const [mx, my] = [mean(xs), mean(ys)];
  const covariance = xs.reduce((sum, x, i) => sum + (x - mx) * (ys[i] - my), 0);
  return 2 ** (covariance / xs.reduce((sum, x) => sum + (x - mx) ** 2, 0));
}

const trend = (factor) => (factor >= 1.05 ? "rising" : factor <= 1 / 1.05 ? "falling" : "flat");

/** Density sweeps: points of one case and configuration with three densities or more. */
function sweepsOf(points) {
  const candidates = points.filter((point) => point.speedup && point.rho !== null && !point.network && point.source === MEASURED);
  const groups = groupBy(candidates, (point) =>
    JSON.stringify([point.suite, point.case, point.metric, configKey(point.config, DENSITY_SET), point.precision, point.device]),
  );
  return [...groups]
    .filter(([, members]) => distinct(members.map(givenDensity)).length > 2)
    .map(([key, members]) => ({ key, members, title: sweepTitle(members) }));
}

function sweepTitle(members) {
  const [{ config, device, precision, case: name }] = members;
  return `${name} (${[configText(config), device, precision].filter(Boolean).join(", ")})`;
}

/** The crossovers of a sweep's case and of its kernels that are selected. */
function crossoversOf({ members }, chosen) {
  return results.crossovers.filter((crossover) => crossover.case === members[0].case && chosen.kernels.has(crossover.kernel));
}

/** The configuration, without the density that was asked for: the one that came out is shown as rho. */
function configText(config) {
  const shown = Object.entries(config).filter(([name]) => name !== DENSITY_SET);
  return shown.map(([name, value]) => `${name} ${typeof value === "object" ? JSON.stringify(value) : value}`).join(", ");
}
