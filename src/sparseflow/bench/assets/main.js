// Controls, and what is drawn anew when one of them changes.

const sweepSelect = document.querySelector("select[name=sweep]");
const networkSelect = document.querySelector("select[name=network]");

function fillFilter(name, points, chosen = ANY) {
  fillSelect(controls.elements[name], [[ANY], ...distinct(points.map((point) => point[name])).map((value) => [value])], chosen);
}

/** The parameter with the most sizes among the honest points. */
function bestScale() {
  const sizes = (scale) => sizesOf(results.points.filter((point) => point.speedup && !isDishonest(point) && sizeOf(point, scale) !== null), scale).length;
  return SCALES.reduce((best, scale) => (sizes(scale) > sizes(best) ? scale : best));
}

function fillControls() {
  fillSelect(controls.elements.scale, SCALES.map((scale) => [scale]), bestScale());
  for (const option of controls.elements.scale.options) option.disabled = !results.points.some((point) => sizeOf(point, option.value) !== null);
  const metrics = distinct(results.points.map((point) => point.metric));
  fillFilter("metric", results.points, metrics.includes("latency") ? "latency" : metrics[0] ?? ANY);
  for (const name of ["suite", "device", "precision"]) fillFilter(name, results.points);
  fillFilter("scope", results.points.filter((point) => !isApproximate(point)));
  document.getElementById("kernels").append(...kernels.map(kernelBox));
  fillSelect(networkSelect, distinct(results.layers.map((layer) => layer.case)).map((name) => [name]));
}

function kernelBox(kernel) {
  const scope = results.points.find((point) => point.kernel === kernel).scope;
  const box = element("input", { type: "checkbox", value: kernel, checked: true });
  return element("label", {}, box, swatch({ ...look(kernel), dash: null, shape: SHAPES[scope] }), kernel);
}

function tickAll(checked) {
  for (const box of document.querySelectorAll("#kernels input")) box.checked = checked;
  redraw();
}

/** How many points are shown, and what hides the others. */
function describe(chosen, shown) {
  const hidden = chosen.dishonest ? 0 : results.points.filter((point) => isDishonest(point) && passes(point, { ...chosen, dishonest: true })).length;
  const filtered = results.points.length - shown - hidden;
  const parts = [`${shown} of ${count(results.points.length, "point")} shown`];
  if (hidden) parts.push(`${hidden} hidden because their baseline is not honest`);
  if (filtered) parts.push(`${filtered} filtered out`);
  document.getElementById("shown").textContent = `${parts.join("; ")}.`;
  document.getElementById("kernel-count").textContent = `${chosen.kernels.size} of ${kernels.length}`;
}

function redrawSweep(chosen, points) {
  const sweeps = chosen.metric === ANY ? [] : sweepsOf(points);
  const before = sweepSelect.value;
  fillSelect(sweepSelect, sweeps.map(({ key, title }) => [key, title]), sweeps.some(({ key }) => key === before) ? before : undefined);
  drawSweep(sweeps.find(({ key }) => key === sweepSelect.value), chosen);
}

function redrawLayers() {
  showLayers(results.layers.filter((layer) => layer.case === networkSelect.value));
}

function redraw() {
  const chosen = selection();
  const passed = results.points.filter((point) => passes(point, chosen));
  const [exact, approximate] = [passed.filter((point) => !isApproximate(point)), passed.filter(isApproximate)];
  describe(chosen, passed.length);
  drawScale("scale", exact, chosen);
  showSizes(drawSizes(exact, chosen));
  redrawSweep(chosen, exact);
  showCrossovers(results.crossovers.filter((crossover) => chosen.kernels.has(crossover.kernel)), results.crossovers.length ? undefined : "This run recorded no crossover.");
  drawMemory(results.points.filter((point) => !isApproximate(point) && passes(point, chosen, "memory")));
  drawPhases(chosen);
  redrawPoints(chosen);
  redrawApproximate(chosen, approximate);
}

function redrawPoints(chosen) {
  const matching = results.points.filter((point) => !isApproximate(point) && passes(point, chosen) && found(point, chosen.words));
  showPoints(matching, results.points.length ? undefined : "This run recorded no points.");
}

function redrawApproximate(chosen, approximate) {
  const none = "This run measured no approximate method.";
  const any = results.points.some(isApproximate);
  if (any) drawScale("approximate", approximate, chosen);
  else leaveEmpty("approximate", none);
  showApproximate(approximate, any ? undefined : none);
}

fillControls();
redrawLayers();
redraw();
controls.addEventListener("input", redraw);
controls.addEventListener("submit", (event) => event.preventDefault());
sweepSelect.addEventListener("input", redraw);
networkSelect.addEventListener("input", redrawLayers);
document.querySelector("input[name=text]").addEventListener("input", () => redrawPoints(selection()));
document.getElementById("all-kernels").addEventListener("click", () => tickAll(true));
document.getElementById("no-kernels").addEventListener("click", () => tickAll(false));
for (const query of ["(prefers-color-scheme: dark)", "(max-width: 600px)"]) matchMedia(query).addEventListener("change", redraw);
