// The end: finishing, saving, and what the rater preferred.

function sheet(...children) {
  document.body.dataset.screen = "end";
  shownItem = null;
  byId("end").replaceChildren(...children);
  byId("end").focus({ preventScroll: true });
  scrollTo(0, 0);
}
function showWords(title, paragraphs) {
  stopClock();
  over = true;
  byId("notice").hidden = true;
  byId("saved").textContent = "";
  sheet(make("h2", {}, title), ...paragraphs.map((words) => make("p", {}, words)));
}
let drawn = "";
function showEnd(answers) {
  const [open, closed] = [pairs.size - answers.size, votes.closed()];
  const drawing = `${open} ${closed}`;
  if (document.body.dataset.screen === "end" && drawn === drawing) return;
  drawn = drawing;
  if (live) sheet(...endOnServer(open));
  else sheet(...(closed ? endSaved() : endInBrowser(open)));
}
function endTitle(open) {
  if (!pairs.size) return "There is no pair to judge: both answers are the same text everywhere";
  return open ? `${count(open, "pair is", "pairs are")} not judged yet` : `All ${pairs.size} pairs are judged`;
}
function otherWay(open) {
  if (!pairs.size) return [];
  return [open ? button("Judge the rest", () => go(nextOpen(-1)), true) : button("Look at them again", () => go(view.order.length - 1))];
}
function endOnServer(open) {
  const finish = button(open ? "Finish all the same" : "Finish and show the names", async (event) => {
    event.target.disabled = true;
    const state = await votes.finish();
    event.target.disabled = false;
    if (state) showResult(state);
  }, !open);
  return [
    make("h2", {}, endTitle(open)),
    make("p", {}, "When you finish, the names are shown, and your votes cannot be changed any more."),
    open ? make("p", {}, "You can also close this page and go on later: what you judged is kept.") : "",
    make("div", { className: "actions" }, ...(open ? [...otherWay(open), finish] : [finish, ...otherWay(open)])),
  ];
}
function endInBrowser(open) {
  const finish = button(open ? "Finish all the same and save" : "Finish and save the votes", () => { votes.setClosed(true); download(votes.text()); }, !open);
  return [
    make("h2", {}, endTitle(open)),
    make("p", {}, `Your votes go into a file, ${fileName()}. Send it back to whoever gave you this page: there it is told which answer was whose.`),
    make("div", { className: "actions" }, ...(open ? [...otherWay(open), finish] : [finish, ...otherWay(open)]),
      open ? button("Save a copy and go on later", () => download(votes.text())) : ""),
  ];
}
function endSaved() {
  const text = make("textarea", { readOnly: true, value: votes.text(), onfocus: (event) => event.target.select() });
  text.setAttribute("aria-label", "Content of the file");
  return [
    make("h2", {}, "Thank you. One thing is left to do"),
    make("p", {}, `Send the file ${fileName()} back to whoever gave you this page. Your browser put it where downloads go.`),
    make("div", { className: "actions" }, button("Save it again", () => download(votes.text()), true),
      button("Change my votes", () => { votes.setClosed(false); go(view.order.length - 1); })),
    make("details", { className: "copy" }, make("summary", {}, "No file came? Send this text instead"), text),
  ];
}
const fileName = () => `votes-${given.rater}.json`;
function download(text) {
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  make("a", { href: address, download: fileName() }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60000);
}
function showResult(state) {
  const { result, answers } = state;
  if (!result) {
    showWords("Finished", ["Your votes are kept. The result cannot be shown here; the command says why."]);
    return;
  }
  const { names, wins } = result;
  const parts = [
    [`Preferred: ${names[0]}`, wins[0], "first"], ["About the same", result.ties, "same"], ["Both bad", result.both_bad, "bad"],
    [`Preferred: ${names[1]}`, wins[1], "second"],
  ];
  const rest = [["The same text twice, not shown", result.same_text], ["Not judged", result.not_judged]].filter(([, number]) => number);
  const bar = make("div", { className: "bar" }, ...parts.filter(([, number]) => number).map(([, number, kind]) => {
    const part = make("span", { className: kind });
    part.style.flexGrow = number;
    return part;
  }));
  bar.setAttribute("role", "img");
  bar.setAttribute("aria-label", parts.map(([name, number]) => `${name}: ${number}`).join(", "));
  const line = ([name, number, kind]) => make("li", {}, make("i", { className: kind || "" }), make("span", {}, name), make("b", {}, String(number)));
  showWords(`You preferred ${names[0]} in ${count(wins[0], "pair", "pairs")} and ${names[1]} in ${wins[1]}`, [result.reading]);
  byId("end").append(
    bar, make("ul", { className: "legend" }, ...parts.map(line), ...rest.map(line)),
    make("h3", {}, "What you judged"), ...given.pairs.map((pair, place) => judged(pair, place, result, answers[pair.item])),
    make("p", { className: "muted" }, "You can close this page."),
  );
}
// A prompt from the line on in which it differs from the one that is most like it: templates begin all of them alike.
const prompts = [...new Set(given.pairs.map((pair) => pair.prompt))].sort();
function shortly(prompt) {
  const place = prompts.indexOf(prompt);
  const common = [prompts[place - 1], prompts[place + 1]].map((other) => {
    let length = 0;
    while (other !== undefined && length < prompt.length && prompt[length] === other[length]) length += 1;
    return length;
  });
  const start = prompt.lastIndexOf("\n", Math.max(...common) - 1) + 1;
  return `${start ? "… " : ""}${prompt.slice(start).trim()}`;
}
function judged(pair, place, result, choice) {
  const onLeft = result.left[pair.item];
  const names = [result.names[onLeft], result.names[1 - onLeft]];
  const kinds = onLeft ? ["second", "first"] : ["first", "second"];
  const [name, kind] = { left: [names[0], kinds[0]], right: [names[1], kinds[1]], tie: [CHOICES.tie, "same"], both_bad: [CHOICES.both_bad, "bad"] }[choice] || ["not judged", ""];
  const side = (text, words, chosen) => {
    const box = make("div", { className: "text", dir: "auto" });
    fill(box, text);
    return make("div", { className: chosen ? "answer chosen" : "answer" }, make("h2", {}, words), box);
  };
  return make("details", {},
    make("summary", {}, make("span", { className: "muted" }, String(place + 1)), make("span", { dir: "auto" }, shortly(pair.prompt) || "(picture)"), make("b", {}, make("i", { className: kind }), name)),
    make("div", { className: "pictures", hidden: !pair.pictures.length }, ...pictures(pair)),
    make("div", { className: "text", dir: "auto" }, pair.prompt),
    make("div", { className: "answers" },
      side(pair.left, `A: ${names[0]}`, choice === "left"), side(pair.right, `B: ${names[1]}`, choice === "right")));
}
