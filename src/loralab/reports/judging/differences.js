// Where two answers differ, word by word.

const WORD = /[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]\s*|(?:(?![\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af])[\p{L}\p{M}\p{N}_])+\s*|[^]\s*/gu;
const MOST_COMPARED = 4e6;

// Longest common subsequence of words; null where both are too long for it.
function differences(left, right) {
  const [a, b] = [left.match(WORD) || [], right.match(WORD) || []];
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start += 1;
  let [m, n] = [a.length, b.length];
  while (m > start && n > start && a[m - 1] === b[n - 1]) { m -= 1; n -= 1; }
  const [rows, columns] = [m - start, n - start];
  if ((rows + 1) * (columns + 1) > MOST_COMPARED) return null;
  const longest = new Uint16Array((rows + 1) * (columns + 1));
  const at = (i, j) => i * (columns + 1) + j;
  for (let i = rows - 1; i >= 0; i -= 1) {
    for (let j = columns - 1; j >= 0; j -= 1) {
      longest[at(i, j)] = a[start + i] === b[start + j] ? longest[at(i + 1, j + 1)] + 1 : Math.max(longest[at(i + 1, j)], longest[at(i, j + 1)]);
    }
  }
  const own = [new Uint8Array(a.length), new Uint8Array(b.length)];
  let [i, j] = [0, 0];
  while (i < rows || j < columns) {
    if (i < rows && j < columns && a[start + i] === b[start + j]) { i += 1; j += 1; }
    else if (j >= columns || (i < rows && longest[at(i + 1, j)] >= longest[at(i, j + 1)])) { own[0][start + i] = 1; i += 1; }
    else { own[1][start + j] = 1; j += 1; }
  }
  return [pieces(a, own[0]), pieces(b, own[1])];
}
function pieces(words, own) {
  const found = [];
  words.forEach((word, place) => {
    const last = found[found.length - 1];
    if (last && last[1] === Boolean(own[place])) last[0] += word;
    else found.push([word, Boolean(own[place])]);
  });
  return found;
}
