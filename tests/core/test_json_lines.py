import json

import pytest

from bessemer.core.records import json_lines


def test_a_line_ends_at_a_line_feed_alone():
    texts = ["a\u2028b", "c\u2029d\x85e", "f"]
    written = "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts)
    assert json_lines(written + "\n") == texts
    with pytest.raises(json.JSONDecodeError):
        json_lines('"a\n')
