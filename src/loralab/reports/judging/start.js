// What every part of the voting page uses. The files of this folder are one program, joined in the order of `judging/page.py`.

const byId = (id) => document.getElementById(id);
const given = JSON.parse(byId("given").textContent);
const pairs = new Map(given.pairs.map((pair) => [pair.item, pair]));
const CHOICES = { left: "A is better", right: "B is better", tie: "about the same", both_bad: "both bad" };
// Two quick presses are one; a pair has to be seen before it is judged.
const SETTLE_MS = 250;

function make(tag, fields, ...children) {
  const element = Object.assign(document.createElement(tag), fields);
  element.append(...children);
  return element;
}
const count = (number, one, many) => `${number} ${number === 1 ? one : many}`;
const button = (words, action, main) => make("button", { type: "button", className: main ? "main" : "", onclick: action }, words);

// Storage may be off or full; then `false` and `null` say so.
function keep(storage, key, value) {
  try { window[storage].setItem(key, JSON.stringify(value)); return true; } catch { return false; }
}
function kept(storage, key) {
  try { return JSON.parse(window[storage].getItem(key)); } catch { return null; }
}
