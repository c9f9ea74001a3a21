// Progress for uploads, and placeholders for pictures that cannot be shown.
// Without this file every page still works.
"use strict";

document.addEventListener("error", (event) => {
  const image = event.target;
  if (!(image instanceof HTMLImageElement) || !image.dataset.kind) return;
  const placeholder = document.createElement("span");
  placeholder.className = "placeholder";
  placeholder.textContent = image.dataset.kind;
  image.replaceWith(placeholder);
}, true);

// An image that failed before this script ran.
for (const image of document.querySelectorAll("img[data-kind]")) {
  if (image.complete && image.naturalWidth === 0) image.dispatchEvent(new Event("error"));
}

const ATTEMPTS = 4;

function newKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function send(form, body, onProgress) {
  return new Promise((resolve) => {
    const request = new XMLHttpRequest();
    request.open("POST", form.action);
    request.setRequestHeader("Accept", "application/json");
    request.responseType = "json";
    request.upload.addEventListener("progress", (event) => {
      if (event.lengthComputable) onProgress(event.loaded / event.total);
    });
    request.addEventListener("loadend", () => resolve({
      status: request.status,
      answer: request.response,
      wait: Number(request.getResponseHeader("Retry-After")) || 2,
    }));
    request.send(body);
  });
}

function addLine(form, file) {
  const line = document.createElement("li");
  const name = document.createElement("bdi");
  const bar = document.createElement("progress");
  const note = document.createElement("span");
  name.className = "name";
  name.textContent = file.name;
  bar.max = 1;
  bar.value = 0;
  note.className = "hint";
  line.append(name, bar, note);
  form.querySelector(".queue").append(line);
  return { line, bar, note };
}

async function upload(form, file) {
  const { line, bar, note } = addLine(form, file);
  const fail = (text) => {
    bar.remove();
    note.textContent = text;
    note.className = "failed";
    return null;
  };
  if (file.size === 0) return fail("The file is empty.");
  if (file.size > Number(form.dataset.limit)) return fail("The file is too large.");
  const body = new FormData(form);
  body.delete("file");
  body.set("key", newKey()); // the same for every attempt, so that a retry stores no second file
  body.append("file", file);
  for (let attempt = 1; ; attempt += 1) {
    const { status, answer, wait } = await send(form, body, (part) => {
      bar.value = part;
      note.textContent = part < 1 ? `${Math.floor(part * 100)} %` : "Storing…";
    });
    if (status === 201 && answer) {
      bar.value = 1;
      const link = document.createElement("a");
      link.href = answer.page;
      link.textContent = "Stored";
      note.replaceChildren(link, ` by ${answer.node}`);
      line.classList.add("done");
      return answer.page;
    }
    const again = status === 0 || status === 502 || status === 503 || status === 504;
    if (!again || attempt === ATTEMPTS) {
      if (answer && answer.detail) return fail(answer.detail);
      return fail(status === 200 || status === 403 ? "Please sign in again." : "The upload did not get through.");
    }
    const reason = status === 0 ? "No connection." : "Not possible at the moment.";
    note.textContent = `${(answer && answer.detail) || reason} Trying again in ${wait} s.`;
    await new Promise((resolve) => setTimeout(resolve, wait * 1000));
  }
}

for (const form of document.querySelectorAll("form[data-upload]")) {
  const input = form.querySelector("input[type=file]");
  const drop = form.querySelector(".drop");
  const button = form.querySelector("button");
  input.multiple = !form.elements.picture;

  const start = async (files) => {
    if (button.disabled || files.length === 0) return;
    button.disabled = true;
    const pages = [];
    for (const file of files) pages.push(await upload(form, file));
    button.disabled = false;
    input.value = "";
    if (pages.length === 1 && pages[0]) window.location.assign(pages[0]);
  };

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    start([...input.files]);
  });
  for (const type of ["dragenter", "dragover"]) {
    drop.addEventListener(type, (event) => {
      event.preventDefault();
      drop.classList.add("over");
    });
  }
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    const files = [...event.dataTransfer.files];
    start(input.multiple ? files : files.slice(0, 1));
  });
}
