// Keys and buttons, and the start of it all.

const KEYS = {
  1: () => choose("left"), arrowleft: () => choose("left"), 2: () => choose("right"), arrowright: () => choose("right"),
  3: () => choose("tie"), arrowdown: () => choose("tie"), 4: () => choose("both_bad"), backspace: back, arrowup: back,
  enter: forward, s: skip, m: () => toggle("mono"), d: () => toggle("marks"), "?": () => byId("help").showModal(),
};
const scrolls = (box) => box.scrollHeight > box.clientHeight + 1;
addEventListener("keydown", (event) => {
  const key = (event.key || "").toLowerCase();
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || over || votes.closed() || byId("help").open) return;
  if (!Object.hasOwn(KEYS, key) || (!item() && KEYS[key] !== back)) return;
  if (key === "enter" && event.target.closest("button, summary, a")) return;
  // Up and down scroll what the rater is in, or the window, where there is more to read.
  const box = event.target.closest(".text") || document.scrollingElement;
  if ((key === "arrowup" || key === "arrowdown") && scrolls(box)) return;
  event.preventDefault();
  if (!event.repeat) KEYS[key]();
});
document.querySelectorAll("[data-choice]").forEach((each) => each.addEventListener("click", () => choose(each.dataset.choice)));
const CLICKS = {
  back, skip, forward, withdraw, early: () => go(view.order.length), mono: KEYS.m, marks: KEYS.d, keys: KEYS["?"], again: () => votes.retry(),
};
for (const [id, action] of Object.entries(CLICKS)) byId(id).addEventListener("click", action);
document.addEventListener("visibilitychange", () => { if (document.hidden) stopClock(); else startClock(); });
addEventListener("pagehide", () => { stopClock(); keep("sessionStorage", viewKey, view); });
addEventListener("beforeunload", (event) => { if (votes.unsafe() && !over) event.preventDefault(); });

const votes = live ? onServer() : inBrowser();
byId("title").textContent = given.title;
byId("rater").textContent = `Judged by ${given.rater}`;
if (live && given.closed) showWords("This sitting is finished", ["The command shows its result."]);
else go(view.at < 0 ? nextOpen(-1) : view.at);
if (live) fetchPictures();
if (votes.unsafe()) votes.retry();
