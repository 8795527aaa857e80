// What the page asks of the server, and what went wrong in words.

const TRIES = 6; // when the server is busy
const MEANING = {
  401: "This server asks for a token.",
  403: "The server does not accept this token.",
  413: "The image is too large for this server.",
  415: "The server cannot read this kind of file.",
  504: "The image took longer than this server allows.",
};

/** An answer that is none. `status` is 0 where the server could not be reached. */
export class Refusal extends Error {
  constructor(status, message, wait = 1) {
    super(message);
    this.status = status;
    this.wait = wait; // seconds, as the server asks
  }
}

let token = tokenOfAddress() ?? sessionStorage.getItem("fpn-token") ?? "";

export function useToken(text) {
  token = text.trim();
  sessionStorage.setItem("fpn-token", token);
}

export const hasToken = () => token !== "";

/** The token in a link that ends in #token=TEXT, which is then taken out of the address bar. */
function tokenOfAddress() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (!given) return null;
  history.replaceState(null, "", location.pathname + location.search);
  sessionStorage.setItem("fpn-token", given);
  return given;
}

export const model = () => ask("model");

/** All detections of an image file that score `threshold` or more. While the server is busy it is asked again. */
export async function detect(image, threshold, { signal, onBusy }) {
  const headers = { "Content-Type": image.type || "application/octet-stream" };
  for (let left = TRIES; ; left--) {
    try {
      return await ask(`detect?threshold=${threshold}`, { method: "POST", body: image, headers, signal });
    } catch (error) {
      if (error.status !== 503 || left === 1) throw error;
      onBusy(error.wait);
      await pause(error.wait, signal);
    }
  }
}

async function ask(path, { headers = {}, ...options } = {}) {
  let answer;
  try {
    const credentials = token ? { Authorization: `Bearer ${token}` } : {};
    answer = await fetch(path, {
      ...options, headers: { Accept: "application/json", ...headers, ...credentials }, cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, "The server does not answer. Is fpn serve still running?");
  }
  const said = await answer.json().catch((error) => {
    if (error.name === "AbortError") throw error;
    return null;
  });
  if (answer.ok && said) return said;
  const wait = Math.min(30, Math.max(0.1, Number(answer.headers.get("Retry-After") ?? 1) || 0));
  throw new Refusal(answer.status, reason(answer.status, said?.detail), wait);
}

function reason(status, detail) {
  if (Array.isArray(detail)) detail = detail.map((each) => each.msg).join("; ");
  if (typeof detail === "string" && detail) return sentence(detail);
  if (status === 503) return "The server is busy.";
  return MEANING[status] ?? `The server answered with an error (${status}).`;
}

const sentence = (text) => text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

const pause = (seconds, signal) => new Promise((resolve, reject) => {
  const timer = setTimeout(resolve, 1000 * seconds);
  signal?.addEventListener("abort", () => {
    clearTimeout(timer);
    reject(new DOMException("stopped", "AbortError"));
  }, { once: true });
});
