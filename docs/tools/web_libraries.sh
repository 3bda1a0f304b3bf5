#!/bin/sh
# Builds the pages' libraries from their packages, with npm: src/bessemer/webapp/static/vendor. Run it from the top of the repository.
set -eu
out="$PWD/src/bessemer/webapp/static/vendor"
work=$(mktemp -d)
cd "$work"
npm install --silent --no-audit --no-fund markdown-it@14.3.3 katex@0.16.47 highlight.js@11.12.0 esbuild@0.25.12
languages="bash c cpp csharp css diff go ini java javascript json kotlin lua makefile markdown python r ruby rust sql typescript xml yaml"
version() { node -p "require('./node_modules/$1/package.json').version"; }
licenses() { for name in "$@"; do echo "== $name $(version "$name")"; cat node_modules/"$name"/LICENSE*; echo; done; }
bundle() {
    node_modules/.bin/esbuild --bundle --format=esm --minify --charset=utf8 --target=es2022 --legal-comments=none \
        --log-level=warning --banner:js="/* $2 */" --outfile="$out/$1.js" "$1.mjs"
}
echo 'export { default } from "markdown-it";' > markdown-it.mjs
echo 'export { default } from "katex";' > katex.mjs
echo 'import highlight from "highlight.js/lib/core";' > highlight.mjs
for name in $languages; do
    echo "import $name from \"highlight.js/lib/languages/$name\"; highlight.registerLanguage(\"$name\", $name);" >> highlight.mjs
done
echo 'export default highlight;' >> highlight.mjs
mkdir -p "$out"
bundle markdown-it "markdown-it $(version markdown-it): markdown-it-license.txt"
bundle katex "KaTeX $(version katex): katex-license.txt"
bundle highlight "highlight.js $(version highlight.js): highlight-license.txt"
licenses markdown-it linkify-it mdurl entities uc.micro punycode.js > "$out/markdown-it-license.txt"
licenses katex > "$out/katex-license.txt"
licenses highlight.js > "$out/highlight-license.txt"
# without the rarest fonts, and of each the form that every browser reads
python3 - "$out" <<'PYTHON'
import re, shutil, sys
from pathlib import Path

out, built = Path(sys.argv[1]), Path("node_modules/katex/dist")
rare = {"Caligraphic-Bold", "Fraktur-Bold", "SansSerif-Bold", "SansSerif-Italic"}
sheet = (built / "katex.min.css").read_text(encoding="utf-8")
faces = re.findall(r"@font-face\{[^}]*\}", sheet)
for face in faces:
    name = re.search(r"fonts/KaTeX_([\w-]+)\.woff2", face)[1]
    kept = re.sub(r"src:[^}]*", f'src:url("KaTeX_{name}.woff2") format("woff2")', face)
    sheet = sheet.replace(face, "" if name in rare else kept)
    if name not in rare:
        shutil.copy(built / "fonts" / f"KaTeX_{name}.woff2", out)
(out / "katex.css").write_text(sheet, encoding="utf-8")
PYTHON
rm -rf "$work"
ls -l "$out"
