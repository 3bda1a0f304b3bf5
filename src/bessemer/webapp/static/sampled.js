// What was recorded of a token when it was sampled: its probability, those of the likeliest, and what sampling makes of them.

/** { probability, rank, alternatives: [{ id, probability }] } of a place in an answer; null where nothing was recorded. rank: null
 *  where the token is not among the likeliest. */
export function recorded(node, place) {
  const top = node.top?.[place];
  if (!top) return null;
  const [logProb, ids, logProbs] = top, rank = ids.indexOf(node.ids[place]);
  return { probability: Math.exp(logProb), rank: rank < 0 ? null : rank + 1, alternatives: ids.map((id, index) => ({ id, probability: Math.exp(logProbs[index]) })) };
}

/** The surprise of a token in bits: −log₂ of its probability. */
export const surprise = (own) => -Math.log2(Math.max(own.probability, 1e-12));

/** The entropy in bits of the recorded alternatives and of all others as one: the distribution has at least this. */
export function leastEntropy(own) {
  const rest = 1 - own.alternatives.reduce((sum, one) => sum + one.probability, 0);
  const parts = [...own.alternatives.map((one) => one.probability), Math.max(0, rest)];
  return parts.reduce((sum, share) => (share > 0 ? sum - share * Math.log2(share) : sum), 0);
}

/** What is drawn from at some settings: { shares: id → probability, kept: how many tokens }; null where the recorded alternatives do
 *  not decide it, to a thousandth: temperature, then top k, then top p and min p of what that leaves. */
export function drawnFrom(own, { temperature = 1, top_p = 1, top_k = 0, min_p = 0 }) {
  const all = own.alternatives;
  if (!all.length) return null;
  if (temperature === 0) return { shares: new Map([[all[0].id, 1]]), kept: 1 };
  const isWhole = top_k > 0 && top_k <= all.length, some = isWhole ? all.slice(0, top_k) : all;
  const power = 1 / temperature, weights = some.map((one) => one.probability ** power);
  let total = weights.reduce((sum, one) => sum + one, 0);
  if (!isWhole) {
    const rest = Math.max(0, 1 - all.reduce((sum, one) => sum + one.probability, 0)), least = all.at(-1).probability;
    // no other token is likelier than the least of these
    const most = power >= 1 ? rest * least ** (power - 1) : Infinity;
    if (temperature === 1) total = 1;
    else if (rest > 0 && !(most / total < 1e-3)) return null;
  }
  const shares = weights.map((one) => one / total);
  let kept = shares.length, reached = 0;
  if (top_p < 1) {
    kept = shares.findIndex((share) => (reached += share) >= top_p) + 1;
    if (!kept) { if (!isWhole) return null; kept = shares.length; }
  }
  if (min_p > 0) {
    const likely = shares.findIndex((share) => share < min_p * shares[0]);
    if (likely < 0 && !isWhole && kept === shares.length) return null;
    if (likely >= 0) kept = Math.min(kept, likely);
  }
  // all tokens may be drawn, of which these are some
  if (kept === shares.length && !isWhole) {
    if (top_p >= 1 && min_p === 0) return { shares: new Map(some.map((one, place) => [one.id, shares[place]])), kept: null };
    if (top_p >= 1) return null;
  }
  const left = shares.slice(0, kept), sum = left.reduce((one, two) => one + two, 0);
  return { shares: new Map(left.map((share, place) => [some[place].id, share / sum])), kept };
}
