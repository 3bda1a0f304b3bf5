import { byId, savePage } from "./page.js";

// Its commands name this server.
for (const example of document.querySelectorAll("pre")) example.textContent = example.textContent.replace("ADDRESS", location.origin);
if (location.hash) byId(location.hash.slice(1))?.setAttribute("open", "");
byId("export-page")?.addEventListener("click", () => savePage(byId("view"), "API"));
