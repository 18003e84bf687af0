// Controls, and what is drawn anew when one of them changes.

const selects = Object.fromEntries([...document.querySelectorAll("select")].map((select) => [select.name, select]));

/** The first choice that the study varies in, surrogates before all. */
function colours() {
  const varied = results.parameters.filter((name) => distinct(results.nets.map((net) => net[name])).length > 1);
  return varied.sort((a, b) => (b === "surrogate") - (a === "surrogate"));
}

function fillControls() {
  const options = (names) => names.map((name) => [name]);
  const measured = ({ name }) => results.nets.some((net) => isMeasured(net, name));
  fillSelect(selects.dataset, options(distinct(results.nets.map((net) => net.dataset))));
  fillSelect(selects.colour, options(colours().length ? colours() : ["surrogate"]));
  fillSelect(selects.cost, options(COSTS.filter(measured).map(({ name }) => name)));
  fillSelect(selects.outcome, options(results.outcomes.filter(measured).map(({ name }) => name)));
  const paths = distinct(results.predictions.map((row) => row.path));
  fillSelect(selects.path, options(paths), paths.includes("accelerated") ? "accelerated" : paths[0]);
  fillSelect(selects.status, options([ANY, ...distinct(results.nets.map((net) => net.status))]));
}

function describe(chosen) {
  const nets = ofDataset(chosen);
  const parts = [...groupBy(nets, (net) => net.status)].map(([status, members]) => `${members.length} ${status}`);
  document.getElementById("shown").textContent = nets.length ? `${chosen.dataset}: ${count(nets.length, "network")} (${parts.join(", ")}).` : "The study has no networks.";
}

function redrawNets(chosen = selection()) {
  showNets(ofDataset(chosen).filter((net) => [ANY, net.status].includes(chosen.status) && found(net, chosen.words)), results.nets.length ? undefined : "The study has no networks.");
}

function redraw() {
  const chosen = selection();
  describe(chosen);
  for (const drawing of [drawFindings, drawFront, drawDensity, drawEffects, drawPredicted]) drawing(chosen);
  showEffects(effectsOf(chosen));
  redrawNets(chosen);
}

fillControls();
redraw();
for (const select of Object.values(selects)) select.addEventListener("input", redraw);
controls.addEventListener("submit", (event) => event.preventDefault());
document.querySelector("input[name=text]").addEventListener("input", () => redrawNets());
for (const query of ["(prefers-color-scheme: dark)", "(max-width: 600px)"]) matchMedia(query).addEventListener("change", redraw);
