"use strict";
(() => {
  const root = document.documentElement, body = document.body;
  const list = document.getElementById("latents");
  const cards = [...list.querySelectorAll(".latent")];
  const sort = document.getElementById("sort"), filter = document.getElementById("filter");
  const count = document.getElementById("count"), nothing = document.getElementById("nothing");
  const orders = {
    frequency: (a, b) => b.dataset.frequency - a.dataset.frequency,
    max: (a, b) => b.dataset.max - a.dataset.max,
    id: (a, b) => a.dataset.id - b.dataset.id,
  };
  let shown = cards, current = null, scrolled = 0;

  function arrange() {
    const query = filter.value.trim().toLowerCase();
    const sorted = [...cards].sort((a, b) => orders[sort.value](a, b) || orders.id(a, b));
    list.append(...sorted);
    // A number finds that latent; anything else is looked for in the labels.
    const matches = /^\d+$/.test(query)
      ? (c) => c.dataset.id.startsWith(query)
      : (c) => c.dataset.search.includes(query);
    for (const card of cards) card.hidden = !matches(card);
    shown = sorted.filter((c) => !c.hidden);
    nothing.hidden = shown.length > 0 || cards.length === 0;
    if (current && current.hidden && shown.length) location.replace("#" + shown[0].id);
    describe();
  }

  function describe() {
    const n = shown.length, all = cards.length;
    const at = current ? shown.indexOf(current) + 1 : 0;
    count.textContent = at ? `${at} of ${n}` : n === all ? `${n} latents` : `${n} of ${all} latents`;
  }

  function show(mode) {
    if (!document.querySelector(`[data-set-show="${mode}"]`)) return;
    body.dataset.show = mode;
    for (const button of document.querySelectorAll("[data-set-show]"))
      button.setAttribute("aria-pressed", button.dataset.setShow === mode);
    for (const pic of document.querySelectorAll(".pic.swapped")) pic.classList.remove("swapped");
  }

  // The address says what is open, so that a latent can be linked to and the back button works.
  function route() {
    const card = cards.find((c) => "#" + c.id === location.hash) || null;
    if (card && !current) scrolled = scrollY;
    current?.classList.remove("open");
    current = card;
    body.dataset.view = card ? "one" : "all";
    if (card) {
      if (card.hidden) { filter.value = ""; arrange(); }
      card.classList.add("open");
      scrollTo(0, 0);
      card.focus({ preventScroll: true });
    } else scrollTo(0, scrolled);
    describe();
  }

  function step(by) {
    if (!shown.length) return;
    const at = current ? shown.indexOf(current) + by : by > 0 ? 0 : shown.length - 1;
    location.replace("#" + shown[(at + shown.length) % shown.length].id);
  }

  const close = () => { if (current) location.hash = "all"; };

  list.addEventListener("click", (event) => {
    const card = event.target.closest(".latent");
    if (!card || event.target.closest("a")) return;
    if (card !== current) location.hash = card.id;
    else event.target.closest(".pic")?.classList.toggle("swapped");
  });
  for (const button of document.querySelectorAll("[data-set-show]"))
    button.addEventListener("click", () => show(button.dataset.setShow));
  document.getElementById("previous").addEventListener("click", () => step(-1));
  document.getElementById("next").addEventListener("click", () => step(1));
  document.getElementById("back").addEventListener("click", close);
  sort.addEventListener("change", arrange);
  filter.addEventListener("input", arrange);
  addEventListener("hashchange", route);
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target === filter || event.target === sort) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const action = {
      ArrowLeft: () => step(-1), ArrowRight: () => step(1), Escape: close,
      h: () => show("highlight"), p: () => show("plain"), c: () => show("segmentation"),
      "/": () => filter.focus(),
    }[event.key];
    if (action) { event.preventDefault(); action(); }
  });

  root.className = "live";
  arrange();
  route();
})();
