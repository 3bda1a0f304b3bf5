"""The agent's own tools: files of one folder, Python in the sandbox, the web under the collector's rules."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from bessemer.agents.toolbox import Folder, check_kinds, fetch_tool, open_sandbox, python_tool
from bessemer.core.errors import ArtefactError, ConfigError


@pytest.fixture
def files(tmp_path):
    """The tools of a folder beside which a secret lies: `files("read_file", name="a")`."""
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "up").symlink_to(tmp_path)
    tools = {tool.tool.name: tool.tool for tool in Folder(root).tools()}
    return lambda tool, /, **arguments: tools[tool].call(arguments)


def test_files_are_written_listed_read_and_changed(files):
    assert not files("write_file", name="a/b.txt", text="one two").is_error
    assert not files("append_file", name="a/b.txt", text=" three\ud800").is_error
    assert files("edit_file", name="a/b.txt", old="two", new="2").text == "changed a/b.txt"
    assert files("read_file", name="a/b.txt").text == "one 2 three?"
    # a link that leads out of the folder is none of its files
    assert files("list_files").text == "a/b.txt (12 bytes)"


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "link", "up/secret", "a/../../secret"])
def test_nothing_outside_the_folder_is_read_or_written(files, name, tmp_path):
    for tool, more in (("read_file", {}), ("write_file", {"text": "x"}), ("append_file", {"text": "x"})):
        result = files(tool, name=name, **more)
        assert result.is_error and "lies outside the folder" in result.text
    assert (tmp_path / "secret").read_text(encoding="utf-8") == "secret"


def test_an_edit_needs_a_text_that_is_there_once(files):
    files("write_file", name="a", text="x x")
    assert "2 times" in files("edit_file", name="a", old="x", new="y").text
    assert "there is no file 'b'" in files("edit_file", name="b", old="x", new="y").text
    assert "is a folder" in files("write_file", name=".", text="").text


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ArtefactError, match="there is no such folder"):
        Folder(tmp_path / "none")


def test_python_runs_in_the_sandbox_and_a_failure_says_how_it_ended():
    tool = python_tool(open_sandbox(20.0)).tool
    assert tool.call({"code": "print(6 * 7)"}).text == "42"
    failure = tool.call({"code": "import socket\nsocket.create_connection(('127.0.0.1', 80), 1)"})
    assert failure.is_error and "[ended by exit code 1]" in failure.text
    assert tool.call({"code": "pass"}).text == "(it printed nothing)"


def test_a_page_is_read_where_robots_txt_lets_it_and_private_addresses_are_not():
    class Site(BaseHTTPRequestHandler):
        def do_GET(self):
            text = "User-agent: *\nDisallow: /closed\n" if self.path == "/robots.txt" else "the page"
            status = 404 if self.path == "/ai.txt" else 200
            self.send_response(status)
            self.send_header("Content-Type", "text/plain")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Site) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{site.server_port}"
        tool = fetch_tool("tests/1", allow_private=True, delay_seconds=0.0).tool
        assert tool.call({"url": f"{url}/open"}).text == "the page"
        assert "robots.txt forbids it" in tool.call({"url": f"{url}/closed"}).text
        refused = fetch_tool("tests/1").tool.call({"url": f"{url}/open"})
        assert refused.is_error and "inside a network" in refused.text
        site.shutdown()


def test_kinds_of_tools_are_checked():
    check_kinds(["python", "files", "search"], has_folder=True, has_index=True)
    for kinds, said in ((["pyton"], "did you mean 'python'"), (["files"], "--files FOLDER"), (["search"], "--index FOLDER")):
        with pytest.raises(ConfigError, match=said):
            check_kinds(kinds, has_folder=False, has_index=False)
