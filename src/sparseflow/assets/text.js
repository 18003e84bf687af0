// What every page needs of its data: the results inside it, groups of them, and how figures are written. No drawing here.

const results = JSON.parse(document.getElementById("results").textContent);

const distinct = (values) => [...new Set(values)];

/** Items by key, in the order of their first one. */
function groupBy(items, key) {
  const groups = new Map();
  for (const item of items) {
    const name = key(item);
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(item);
  }
  return groups;
}

/** The words of a search field. */
const wordsOf = (text) => text.toLowerCase().split(/\s+/).filter(Boolean);

/** Three significant digits, or a dash where nothing was measured. */
function figure(value) {
  if (value === null || value === undefined) return "-";
  return Math.abs(value) >= 100 || value === 0 ? value.toFixed(0) : value.toPrecision(3);
}

const share = (value) => (value === null || value === undefined ? "-" : `${figure(100 * value)} %`);
const times = (value) => `${figure(value)}x`;
const range = ([low, , high]) => `${figure(low)}-${figure(high)}`;
const count = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;
