"""The main text of a web page: `python extract_page.py [FILE.html]`. Needs the extra data."""

import sys
from pathlib import Path

import bessemer

PAGE = """<html><head><title>How steel became cheap | The Daily Furnace</title></head><body>
<nav><ul><li><a href=/>Home</a><li><a href=/news>News</a><li><a href=/sport>Sport</a></ul></nav>
<article><h1>How steel became cheap</h1>
<p>The converter stands twelve metres high, and when it tips the whole hall turns red for a quarter of an hour.</p>
<p>In the first years, as the records of the works tell, no two heats came out alike, and half were thrown away.</p>
</article><footer><a href=/privacy>Privacy policy</a> &copy; 2019 The Daily Furnace</footer></body></html>"""

html = Path(sys.argv[1]).read_bytes() if len(sys.argv) > 1 else PAGE
print(bessemer.extract(html))
