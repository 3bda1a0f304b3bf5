import io

from bessemer.core.progress import PlainLines, Speed


def test_plain_lines_are_one_line_each_without_control_characters():
    stream = io.StringIO()
    lines = PlainLines(stream, interval=0.0)
    with lines.task("encode", total=4, unit="documents") as task:
        task.advance(2, note="1.0 MB/s")
    written = stream.getvalue()
    assert "encode: 2/4 documents · 1.0 MB/s" in written
    assert "\x1b" not in written
    assert "\r" not in written


def test_time_left_of_a_resumed_task_counts_from_where_it_went_on(monkeypatch):
    now = 0.0
    monkeypatch.setattr("bessemer.core.progress.time.monotonic", lambda: now)
    stream = io.StringIO()
    with PlainLines(stream, interval=0.0).task("train", total=100, completed=90) as task:
        now = 10.0
        task.reach(95)
    assert "95/100 · 10 s left" in stream.getvalue().splitlines()[0]


def test_a_speed_is_of_what_was_done_since_it_was_made(monkeypatch):
    now = 100.0
    monkeypatch.setattr("bessemer.core.progress.time.monotonic", lambda: now)
    speed = Speed()
    now = 102.0
    assert speed.of(5_000, 7_000_000) == "2,500 documents/s · 3.5 MB/s"
