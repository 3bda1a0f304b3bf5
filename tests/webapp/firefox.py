"""Firefox as Playwright drives it: WebDriver BiDi, relayed (`python firefox.py FIREFOX ARGUMENTS`).

Playwright asks for a colour scheme in every context, by a command that Firefox's extended support release does not know yet.
Light, which is what Firefox has without it, is answered here; any other scheme stays an error.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import shutil
import sys
from pathlib import Path

from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve

READY = "WebDriver BiDi listening on "
SCHEME = "emulation.setMediaFeaturesOverride"


def firefox() -> str | None:
    """The Firefox of this machine."""
    return shutil.which("firefox-esr") or shutil.which("firefox")


def write_launcher(path: Path) -> Path:
    """A program that Playwright can start as Firefox."""
    command = shlex.join([sys.executable, str(Path(__file__).resolve()), firefox() or "firefox"])
    path.write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
    path.chmod(0o755)
    return path


async def relay(playwright: ServerConnection, address: str) -> None:
    """Pass messages both ways until either side leaves."""
    request = playwright.request
    assert request is not None
    light: set[int] = set()
    async with connect(address + request.path, max_size=None, proxy=None) as browser:

        async def to_browser() -> None:
            async for message in playwright:
                said = json.loads(message)
                if said["method"] == SCHEME and said["params"]["features"].get("prefers-color-scheme") in (None, "light"):
                    light.add(said["id"])
                await browser.send(message)

        async def to_playwright() -> None:
            async for message in browser:
                said = json.loads(message)
                if said.get("id") in light and said.get("error") == "unknown command":
                    said = {"type": "success", "id": said["id"], "result": {}}
                await playwright.send(json.dumps(said))

        ways = [asyncio.create_task(one()) for one in (to_browser, to_playwright)]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()


async def main(program: str, *arguments: str) -> int:
    """Start Firefox and say where the relay listens, as Firefox says where it does."""
    process = await asyncio.create_subprocess_exec(program, *arguments, stderr=asyncio.subprocess.PIPE)
    assert process.stderr is not None
    address = ""

    async def handle(connection: ServerConnection) -> None:
        await relay(connection, address)

    async with serve(handle, "127.0.0.1", 0, max_size=None) as server:
        try:
            async for line in process.stderr:
                said = line.decode(errors="replace").rstrip("\n")
                if said.startswith(READY):
                    address = said.removeprefix(READY)
                    said = f"{READY}ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
                print(said, file=sys.stderr, flush=True)
            return await process.wait()
        finally:
            if process.returncode is None:
                process.kill()


if __name__ == "__main__":
    sys.exit(asyncio.run(main(*sys.argv[1:])))
