"""Files as people bring them, with their warts, all of the same questions and answers."""

import csv
import gzip
import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard

from tests.core.test_workbook import cells, write_workbook

#: The questions and answers of every file. Umlauts tell encodings apart, line ends and quotes delimiters.
ROWS = [(f"Wo ist Bestellung {n}?", f'Bestellung {n} ist „unterwegs“;\nüber Köln, "Tor {n}".') for n in range(60)]


def _said(role: str, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


def _delimited(rows, delimiter: str) -> str:
    stream = io.StringIO(newline="")
    csv.writer(stream, delimiter=delimiter).writerows(rows)
    return stream.getvalue()


def spreadsheet_csv(folder: Path) -> Path:
    """As a German Excel saves it: semicolons, a code page, columns and rows left empty."""
    rows = [["Nr", "Question", "Answer", ""], *([n, q, a, ""] for n, (q, a) in enumerate(ROWS)), ["", "", "", ""]]
    (folder / "tickets.csv").write_bytes(_delimited(rows, ";").encode("cp1252"))
    return folder / "tickets.csv"


def unicode_text(folder: Path) -> Path:
    """As Excel saves “Unicode text”: tabs, UTF-16 with its mark."""
    (folder / "export.tsv").write_bytes(_delimited([("prompt", "response"), *ROWS], "\t").encode("utf-16"))
    return folder / "export.tsv"


def marked_csv(folder: Path) -> Path:
    """UTF-8 with a mark, a line that declares the delimiter, names of columns in other letters, an empty answer."""
    text = "sep=,\r\n" + _delimited([(" Query", "ANSWER"), *ROWS, ("Und nun?", "")], ",")
    (folder / "marked.csv").write_bytes(text.encode("utf-8-sig"))
    return folder / "marked.csv"


def workbook(folder: Path) -> Path:
    """A cover, a title above the header, numbers among the texts."""
    data = (
        cells("Unsere Bestellungen")
        + cells("Frage", "question", "answer")
        + "".join(cells(n, *row) for n, row in enumerate(ROWS))
    )
    return write_workbook(folder / "orders.xlsx", {"Cover": "", "Data": data})


def parquet_of_columns(folder: Path) -> Path:
    """Conversations as a structure of lists, as older versions of `datasets` wrote them."""
    turns = [{"from": ["human", "gpt"], "value": [question, answer]} for question, answer in ROWS]
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(ROWS))), "conversations": turns}), folder / "turns.parquet")
    return folder / "turns.parquet"


def alpaca_under_a_key(folder: Path) -> Path:
    """Alpaca's rows under a key, some outputs empty, some instructions with the question in `input`."""
    rows = [{"instruction": q, "input": "", "output": a} for q, a in ROWS[:30]]
    rows += [{"instruction": "", "input": q, "output": a} for q, a in ROWS[30:]]
    rows[10:10] = [{"instruction": "Und?", "input": "", "output": ""}, {"instruction": "Nun?", "input": "", "output": None}]
    (folder / "alpaca.json").write_text(json.dumps({"version": "1.1", "data": rows}), encoding="utf-8")
    return folder / "alpaca.json"


def sharegpt_in_dialects(folder: Path) -> Path:
    """ShareGPT's rows by several speakers and keys, one without a turn; compressed."""
    speakers = [("human", "gpt"), ("User", "chatgpt"), ("user", "bard"), ("HUMAN", "assistant"), ("human", "bing")]
    rows = []
    for number, (question, answer) in enumerate(ROWS):
        user, assistant = speakers[number % len(speakers)]
        turns = [{"from": user, "value": question}, {"from": assistant, "value": answer}]
        rows.append({"id": f"r{number}", ("conversation" if number % 2 else "conversations"): turns})
    rows.append({"id": "none", "conversations": []})
    (folder / "share.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return folder / "share.jsonl.gz"


#: Rows whose assistant calls a tool, as many as may be left out where a model's chat template writes no calls.
CALLING = (7, 31)
TOOL = {"name": "find_order", "description": "Finds an order.", "parameters": {"type": "object", "properties": {}}}


def openai_messages(folder: Path) -> Path:
    """OpenAI's messages: `developer`, content in parts, a turn of weight 0, two with tools and `function_call`; compressed."""
    rows = []
    for number, (question, answer) in enumerate(ROWS):
        asked = _said("user", [{"type": "text", "text": question}])
        messages = [_said("developer", "Antworte kurz."), asked]
        if number in CALLING:
            call = {"name": "find_order", "arguments": json.dumps({"order": number})}
            messages += [
                _said("assistant", None) | {"function_call": call},
                _said("function", "found") | {"name": "find_order"},
            ]
        else:
            messages += [_said("assistant", "Hm.") | {"weight": 0}, asked]
        tools = {"functions": [TOOL], "parallel_tool_calls": False} if number in CALLING else {}
        rows.append({"messages": [*messages, _said("assistant", answer)], **tools})
    (folder / "openai.jsonl.zst").write_bytes(zstandard.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return folder / "openai.jsonl.zst"


def capitals_in_a_list(folder: Path) -> Path:
    """Dolly's columns in capitals, a list of objects where a line should hold one."""
    rows = [{"Instruction": question, "Context": "", "Response": answer, "Category": "qa"} for question, answer in ROWS]
    (folder / "dolly.jsonl").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return folder / "dolly.jsonl"


def conversations_in_cells(folder: Path) -> Path:
    """Messages in a cell of CSV, as pandas writes a list."""
    messages = [[_said("user", question), _said("assistant", answer)] for question, answer in ROWS]
    (folder / "cells.csv").write_text(_delimited([("messages",), *([repr(one)] for one in messages)], ","), encoding="utf-8")
    return folder / "cells.csv"


def prompts_and_completions(folder: Path) -> Path:
    """Objects a line in a `.json`, of which two lines are cut off."""
    lines = [json.dumps({"prompt": [_said("user", q)], "completion": [_said("assistant", a)]}) for q, a in ROWS]
    lines[20:20] = ['{"prompt": [{"role": "user", "con', "[]"]
    (folder / "pairs.json").write_text("\n".join(lines), encoding="utf-8")
    return folder / "pairs.json"


def hub_layout(folder: Path) -> Path:
    """A data set as the hub keeps it: a card with configurations, shards of a split."""
    (folder / "dataset" / "data").mkdir(parents=True)
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n---\n# Orders\n"
    (folder / "dataset" / "README.md").write_text(card, encoding="utf-8")
    for shard in (0, 1):
        rows = [{"question": q, "answer": a} for q, a in ROWS[30 * shard : 30 * shard + 30]]
        path = folder / "dataset" / "data" / f"train-{shard:05d}-of-00002.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    pyarrow.parquet.write_table(
        pyarrow.table({"question": ["?"], "answer": ["!"]}), folder / "dataset/data/test-00000-of-00001.parquet"
    )
    return folder / "dataset"


def notes(folder: Path) -> Path:
    """A folder of Markdown and of text in a code page, with files that nobody means."""
    (folder / "notes" / "deep").mkdir(parents=True)
    for number in range(6):
        text = f"# Ofen {number}\n\n" + "\n\n".join(
            f"Der Hochofen {number}.{n} schmilzt Möller zu Roheisen." for n in range(40)
        )
        (folder / "notes" / f"n{number}.md").write_text(text, encoding="utf-8")
        (folder / "notes" / "deep" / f"t{number}.txt").write_bytes(text.replace("Ofen", "Öfen").encode("cp1252"))
    (folder / "notes" / ".hidden.md").write_text("nothing", encoding="utf-8")
    return folder / "notes"


#: Questions and answers with a number in them, by the code page in which programs of their country save them.
FOREIGN = {
    "cp949": ("주문 {n}번은 어디에 있나요?", "주문 {n}번은 오늘 출발했고,\n“내일” 도착합니다."),
    "gb18030": ("订单{n}在哪里？", "订单{n}已经发货，\n预计“明天”送达。"),
    "big5": ("訂單{n}在哪裡？", "訂單{n}已經出貨，\n預計「明天」送達。"),
    "windows-1256": ("أين الطلب رقم {n}؟", 'الطلب رقم {n} في الطريق؛\nوسيصل "غدا".'),
    # Devanagari has no code page that programs still write
    "utf-16": ("ऑर्डर {n} कहाँ है?", "ऑर्डर {n} रास्ते में है,\n“कल” पहुँचेगा।"),
}


def foreign_rows(encoding: str) -> list[tuple[str, str]]:
    """The questions and answers of a language, as many as every file has."""
    question, answer = FOREIGN[encoding]
    return [(question.format(n=n), answer.format(n=n)) for n in range(len(ROWS))]


def foreign_csv(folder: Path, encoding: str) -> Path:
    """A table that a spreadsheet saved in a language's code page, with semicolons."""
    path = folder / f"{encoding}.csv"
    path.write_bytes(_delimited([("question", "answer"), *foreign_rows(encoding)], ";").encode(encoding))
    return path


#: Makes a file in a folder → rows that cannot be used.
TABLES = {
    spreadsheet_csv: 0,
    unicode_text: 0,
    marked_csv: 1,
    workbook: 0,
    parquet_of_columns: 0,
    alpaca_under_a_key: 2,
    sharegpt_in_dialects: 1,
    openai_messages: 0,
    capitals_in_a_list: 0,
    conversations_in_cells: 0,
    prompts_and_completions: 2,
    hub_layout: 0,
}
