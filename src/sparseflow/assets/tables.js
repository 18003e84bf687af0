// Tables: sorted by their headings, scrolled inside their box, long ones shown in steps.

const STEP = 200;

function element(tag, { text, ...properties } = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  if (text !== undefined) made.textContent = text;
  made.append(...children);
  return made;
}

/** Order of two sort keys; what is missing comes last in both directions. */
function order(a, b, direction) {
  if (a === null || b === null) return (a === null) - (b === null);
  return direction * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
}

/**
 * A table in `box`. A column has `title`, `key(row)` to sort by (null: missing), `cell(row)`: text or nodes, and the class of
 * its cells. Returns what shows other rows.
 */
function sortableTable(box, label, columns, { rowClass = () => "", empty }) {
  let rows = [];
  let sorted = { column: null, direction: 1 };
  let limit = STEP;
  const headings = columns.map((column) => {
    const button = element("button", { type: "button", text: column.title });
    const heading = element("th", { scope: "col", className: column.kind === "figure" ? "figure" : "" }, button);
    button.addEventListener("click", () => sortBy(column, heading));
    return heading;
  });
  const body = element("tbody");
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...headings)), body);
  const scroll = element("div", { className: "scroll", tabIndex: 0, role: "region", ariaLabel: label }, table);
  const more = element("button", { type: "button", className: "more" });
  const nothing = element("p", { className: "empty" });
  more.addEventListener("click", () => {
    limit += STEP;
    fill();
  });
  box.replaceChildren(scroll, more, nothing);

  function sortBy(column, heading) {
    sorted = { column, direction: sorted.column === column ? -sorted.direction : 1 };
    for (const other of headings) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", sorted.direction > 0 ? "ascending" : "descending");
    fill();
  }

  function fill() {
    const { column, direction } = sorted;
    const ordered = column ? [...rows].sort((a, b) => order(column.key(a), column.key(b), direction)) : rows;
    body.replaceChildren(...ordered.slice(0, limit).map((row) => element("tr", { className: rowClass(row) }, ...columns.map((column) => cellOf(column, row)))));
    scroll.hidden = !rows.length;
    nothing.hidden = Boolean(rows.length);
    more.hidden = rows.length <= limit;
    more.textContent = `Show ${Math.min(STEP, rows.length - limit)} more of ${rows.length}`;
  }

  return (newRows, why = empty) => {
    rows = newRows;
    limit = STEP;
    nothing.textContent = why;
    fill();
  };
}

function cellOf(column, row) {
  const content = column.cell(row);
  return element("td", { className: column.kind ?? "" }, ...(Array.isArray(content) ? content : [content]));
}

/** A second line in small letters. */
const small = (text) => element("span", { className: "spread", text });
const tag = (text) => element("span", { className: "tag", text });
const text = (title, field, kind) => ({ title, kind, key: (row) => row[field], cell: (row) => String(row[field]) });
const quantileCell = (quantiles, unit) => (quantiles ? [`${figure(quantiles[1])} ${unit}`, small(`(${range(quantiles)})`)] : "-");

function fillSelect(select, options, chosen = options[0]?.[0]) {
  select.replaceChildren(...options.map(([value, label = value]) => element("option", { value, text: label })));
  if (chosen !== undefined) select.value = chosen;
  select.disabled = options.length < 2;
}
