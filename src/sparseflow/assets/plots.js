// Charts: what every page draws with. Every chart says below itself how much it shows, or why it is empty.

const FADED = 0.35;
const SVG = "http://www.w3.org/2000/svg";
const PATHS = {
  circle: "M12 2a4.5 4.5 0 1 0 .01 0z", diamond: "M12 1l5.5 5.5L12 12 6.5 6.5z", "triangle-up": "M12 1.5l5.5 9.5h-11z",
  x: "M8 1.5l4 3.5 4-3.5 2 2-3.8 3.5 3.8 3.5-2 2-4-3.5-4 3.5-2-2 3.8-3.5L6 3.5z", tick: "M11 0h2.4v13h-2.4z",
  "triangle-down": "M12 11.5L6.5 2h11z", square: "M6.5 1h11v11h-11z",
};

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const isNarrow = () => window.innerWidth <= 600;
// Plotly reads text as HTML, so that a name in angle brackets would vanish.
const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const lines = (...parts) => parts.filter(Boolean).map(plain).join("<br>");

/** A small picture of a mark: what a legend shows beside a name. */
function swatch({ colour, dash = null, dotted = false, shape = "circle", open = false, faded = false }) {
  const svg = document.createElementNS(SVG, "svg");
  for (const [name, value] of Object.entries({ width: 24, height: 13, "aria-hidden": "true", opacity: faded ? FADED : 1 })) svg.setAttribute(name, value);
  const add = (tag, attributes) => {
    const part = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) part.setAttribute(name, value);
    svg.append(part);
  };
  const strokes = { solid: "none", dash: "6 3", dot: "2 2" };
  if (dash) add("path", { d: "M0 6.5h24", stroke: colour, "stroke-width": 2, "stroke-dasharray": strokes[dash] });
  add("path", { d: PATHS[shape], fill: open ? "none" : colour, stroke: colour, "stroke-width": 1.2 });
  if (dotted) add("circle", { cx: 12, cy: 6.8, r: 1.4, fill: css("--page") });
  return svg;
}

/** The parts of a section: its chart, legend and caption. */
function figureOf(id) {
  const box = document.querySelector(`#${id} figure`);
  return { chart: box.querySelector(".chart"), legend: box.querySelector(".legend"), caption: box.querySelector("figcaption") };
}

function setLegend(box, entries) {
  box.replaceChildren(...entries.map(([mark, text]) => {
    const entry = document.createElement("span");
    entry.append(swatch(mark), text);
    return entry;
  }));
}

/** Draw, and say the same in words for those who cannot see it. */
function draw(id, traces, layout, caption) {
  const { chart, caption: below } = figureOf(id);
  chart.hidden = false;
  chart.setAttribute("aria-label", caption);
  below.textContent = caption;
  Plotly.react(chart, traces, layout, { displaylogo: false, responsive: true, displayModeBar: false });
}

function leaveEmpty(id, why) {
  const { chart, legend, caption } = figureOf(id);
  Plotly.purge(chart);
  chart.hidden = true;
  legend.replaceChildren();
  const note = document.createElement("p");
  note.className = "empty";
  note.textContent = why;
  caption.replaceChildren(note);
}

// ---- axes --------------------------------------------------------------------------------------------------------------

function layoutOf(xaxis, yaxis, more = {}) {
  const axis = { gridcolor: css("--line"), zeroline: false, linecolor: css("--line"), automargin: true };
  return {
    height: isNarrow() ? 340 : 430,
    margin: { l: isNarrow() ? 44 : 60, r: 12, t: 12, b: 48 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: isNarrow() ? 11 : 13, color: css("--text") },
    showlegend: false,
    hovermode: "closest",
    hoverlabel: { align: "left" },
    dragmode: isNarrow() ? false : "zoom", // a finger scrolls the page
    xaxis: { ...axis, ...xaxis },
    yaxis: { ...axis, ...yaxis },
    ...more,
  };
}

/** A logarithmic axis around the values, with a tick at each named one. */
function logAxis(title, values, text, { pad = 1.25, named = values } = {}) {
  const [low, high] = [Math.min(...values) / pad, Math.max(...values) * pad];
  const ticks = thinned(distinct(named).sort((a, b) => a - b));
  return { type: "log", title: { text: title }, range: [Math.log10(low), Math.log10(high)], tickvals: ticks, ticktext: ticks.map(text), tickangle: 0 };
}

/** Values at least a quarter octave apart, so that their labels do. */
function thinned(values) {
  const step = isNarrow() ? 1.45 : 1.19;
  return values.reduce((kept, value) => (kept.length && value < kept.at(-1) * step ? kept : [...kept, value]), []);
}
