from bessemer.core.metrics import MetricsLog, read_metrics


def test_records_come_back_in_order(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.write(0, loss=3.0)
        log.write(1, loss=2.0)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": 3.0}, {"step": 1, "loss": 2.0}]


def test_resuming_cuts_what_came_after_the_checkpoint_and_a_half_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in range(5):
            log.write(step, loss=1.0)
    path.write_text(path.read_text(encoding="utf-8") + '{"step": 5, "lo', encoding="utf-8")
    with MetricsLog(path, resume_at=2) as log:
        log.write(3, loss=0.5)
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2, 3]


def test_a_new_log_starts_empty(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 9}\n', encoding="utf-8")
    MetricsLog(path).close()
    assert read_metrics(path) == []
