// One pair: where the rater is, what the rater does, and what is shown.

const live = given.mode === "live";
const viewKey = `judging-view:${live ? location.pathname : `${given.items_sha256}:${given.rater}`}`;
const view = { order: [...pairs.keys()], at: -1, spent: {}, mono: false, marks: false };
const before = kept("sessionStorage", viewKey);
if (before && Array.isArray(before.order) && [...before.order].sort().join() === [...pairs.keys()].sort().join()) Object.assign(view, before);

let clock = null; // since when the pair is looked at; null while nobody does
let shownAt = 0;
let shownItem = null;
let over = false; // the end is shown for good

const item = () => view.order[view.at];
function stopClock() {
  if (clock !== null && item()) view.spent[item()] = (view.spent[item()] || 0) + (performance.now() - clock) / 1000;
  clock = null;
}
function startClock() {
  clock = document.hidden || !item() || over ? null : performance.now();
}
function nextOpen(from) {
  const answers = votes.answers();
  const { order } = view;
  for (let step = 1; step <= order.length; step += 1) {
    const at = (from + step + order.length) % order.length;
    if (!answers.has(order[at])) return at;
  }
  return order.length;
}
function go(at) {
  stopClock();
  view.at = Math.max(0, Math.min(at, view.order.length));
  keep("sessionStorage", viewKey, view);
  refresh();
  startClock();
}
function say(words) { byId("status").textContent = words; }

function choose(choice) {
  if (!item() || performance.now() - shownAt < SETTLE_MS) return;
  stopClock();
  const seconds = Math.round((view.spent[item()] || 0) * 10) / 10;
  const place = view.at + 1;
  votes.act(item(), choice, seconds <= given.longest_seconds ? seconds : null);
  go(nextOpen(view.at));
  say(`Pair ${place}: ${CHOICES[choice]}`);
}
function back() { if (view.at > 0) { go(view.at - 1); say(""); } }
function forward() {
  if (!item() || !votes.answers().has(item())) return;
  go(view.at + 1 < view.order.length ? view.at + 1 : nextOpen(view.at));
  say("");
}
function skip() {
  if (!item()) return;
  if (votes.answers().has(item())) { forward(); return; }
  stopClock();
  view.order.push(...view.order.splice(view.at, 1));
  const next = nextOpen(view.at - 1);
  if (view.order[next] === shownItem) say("No other pair is left to judge");
  else say("Skipped; it comes again at the end");
  go(next);
}
function withdraw() {
  if (!item()) return;
  votes.act(item(), null, null);
  refresh();
  say("Your vote on this pair is taken back");
}
function toggle(name) { view[name] = !view[name]; keep("sessionStorage", viewKey, view); shownItem = null; refresh(); }

function fill(box, text, pieces) {
  if (!text.trim()) box.replaceChildren(make("span", { className: "empty" }, text ? "only blanks" : "empty"));
  else if (!pieces) box.textContent = text;
  else box.replaceChildren(...pieces.map(([words, differs]) => (differs ? make("mark", {}, words) : words)));
  box.scrollTop = 0;
}
const addresses = [...given.pictures];
// Pictures are taken into the page at the start: the result shows them when the server has ended.
async function fetchPictures() {
  for (const [place, address] of given.pictures.entries()) {
    const reply = await fetch(address).catch(() => null);
    if (reply) addresses[place] = reply.ok ? URL.createObjectURL(await reply.blob()) : null;
  }
  shownItem = null;
  refresh();
}
function pictures(pair) {
  return pair.pictures.map((place, number) => {
    const name = `Picture ${number + 1} of the prompt`;
    return addresses[place] === null ? make("p", {}, `${name} is not there`) : make("img", { src: addresses[place], alt: name });
  });
}
function showPair() {
  const pair = pairs.get(item());
  const marked = view.marks ? differences(pair.left, pair.right) : null;
  fill(byId("prompt"), pair.prompt);
  fill(byId("left"), pair.left, marked && marked[0]);
  fill(byId("right"), pair.right, marked && marked[1]);
  byId("marks").textContent = view.marks && !marked ? "Too long to compare" : "Differences";
  byId("pictures").replaceChildren(...pictures(pair));
  byId("pictures").hidden = !pair.pictures.length;
  byId("prompt").hidden = !pair.prompt && pair.pictures.length > 0;
}
function refresh() {
  if (over) return;
  const answers = votes.answers();
  const problem = votes.problem();
  byId("notice").hidden = !problem;
  if (byId("notice").firstChild.textContent !== problem) byId("notice").firstChild.textContent = problem;
  byId("again").hidden = !votes.retries();
  byId("saved").textContent = answers.size || votes.unsafe() ? votes.words() : "";
  byId("saved").classList.toggle("open", votes.unsafe() && Boolean(problem));
  showProgress(answers);
  if (item() && !votes.closed()) showCurrent(answers);
  else showEnd(answers);
}
function showProgress(answers) {
  const bar = byId("progress");
  bar.setAttribute("aria-valuemax", pairs.size);
  bar.setAttribute("aria-valuenow", answers.size);
  bar.setAttribute("aria-valuetext", `${answers.size} of ${pairs.size} judged`);
  bar.classList.toggle("many", view.order.length > 60);
  if (bar.childElementCount !== view.order.length) bar.replaceChildren(...view.order.map(() => make("span", {})));
  view.order.forEach((each, place) => {
    bar.children[place].className = `${answers.has(each) ? "judged" : ""} ${place === view.at ? "here" : ""}`;
  });
  byId("place").textContent = item() ? `Pair ${view.at + 1} of ${pairs.size}` : `${answers.size} of ${pairs.size} judged`;
}
function showCurrent(answers) {
  document.body.dataset.screen = "pair";
  document.body.classList.toggle("mono", view.mono);
  for (const name of ["mono", "marks"]) byId(name).setAttribute("aria-pressed", view[name]);
  const chosen = answers.get(item());
  document.querySelectorAll("[data-choice]").forEach((each) => each.setAttribute("aria-pressed", each.dataset.choice === chosen));
  byId("back").disabled = view.at === 0;
  byId("skip").hidden = chosen !== undefined;
  byId("forward").hidden = byId("withdraw").hidden = chosen === undefined;
  if (shownItem === item()) return;
  shownItem = item();
  shownAt = performance.now();
  showPair();
  byId("pair").classList.remove("fresh");
  requestAnimationFrame(() => byId("pair").classList.add("fresh"));
  scrollTo(0, 0);
}
