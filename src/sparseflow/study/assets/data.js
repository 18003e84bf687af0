// What of the study is selected, and how its networks are named and coloured. No drawing here.

const controls = document.getElementById("controls");
const ANY = "any";
const COMPLETE = "complete";
const ACCURACY = "accuracy";
const COSTS = results.outcomes.filter(({ name }) => name !== ACCURACY);
const PATHS_OF = { "accelerated latency": "accelerated", "dense latency": "dense" };
const MARKS = ["circle", "diamond", "square", "triangle-up"];

const unitOf = (name) => results.outcomes.find((outcome) => outcome.name === name).unit;

/** What the controls say. */
function selection() {
  const chosen = Object.fromEntries([...document.querySelectorAll("select")].map((select) => [select.name, select.value]));
  return { ...chosen, words: wordsOf(document.querySelector("input[name=text]").value) };
}

const ofDataset = ({ dataset }) => results.nets.filter((net) => net.dataset === dataset);
const isMeasured = (net, name) => (net[name] ?? null) !== null;

const title = (net) => `${net.neuron}, ${net.surrogate}`;
const details = (net) =>
  [`beta ${net.beta}`, `threshold ${net.threshold}`, `slope ${net.slope}`, `equal ${net.matched}`, net.framework, `seed ${net.seed}`].join(", ");

/** Whether every word of the search occurs somewhere in the network's row. */
function found(net, words) {
  const row = [title(net), details(net), net.dataset, net.status, net.error].join(" ").toLowerCase();
  return words.every((word) => row.includes(word));
}

/** Values of a parameter within the dataset, in the order of the study: the same colours whatever is shown. */
const valuesOf = ({ dataset, colour }) => distinct(ofDataset({ dataset }).map((net) => net[colour]));

/** Colour and shape of a value; where the palette is used up, it starts again with another shape. */
function look(value, values) {
  const index = values.indexOf(value);
  const { length } = results.palette;
  return { colour: results.palette[index % length], shape: MARKS[Math.floor(index / length) % MARKS.length] };
}

const outcomeText = (value, name) => (name === ACCURACY ? share(value) : `${figure(value)} ${unitOf(name)}`);
const signed = (value, digits = 1) => (value > 0 ? "+" : "") + value.toFixed(digits);
const changeUnit = (name) => (name === ACCURACY ? "points" : "%");

/** Counts of what could not be drawn, by status. */
function leftOut(nets, shown) {
  const missing = nets.filter((net) => !shown.includes(net));
  const parts = [...groupBy(missing, (net) => net.status)].map(([status, members]) => `${members.length} ${status === COMPLETE ? "not measured" : status}`);
  return parts.length ? ` Not drawn: ${parts.join(", ")}.` : "";
}
