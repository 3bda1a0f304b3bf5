"""Does a summary keep what was said early in a conversation that no longer fits?

    python benchmarks/summaries.py --model NAME=MODEL [--model NAME=MODEL …] [--whole]   # ten minutes of a core for 1.5B

Ten conversations (`CONVERSATIONS`), in each of which the user says something in passing, in the first or the third message, and
asks for it at the end, after talk of other things. The context is set so short that the earlier turns become a summary, as a
server with `--context-overflow summarise` makes it, by the same model. Counted is in how many the model's summary holds what
was said (its `key`, in small letters), in how many it does with the sentences that are quoted below it, and in how many the
answer does: from the conversation with both, and with `--whole` from the whole one in a longer context. Greedy; nothing is
timed. Result: `summaries.json`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import recording
from bessemer.core.environment import set_environment

set_environment()  # before PyTorch reads it

from bessemer.assistant.messages import Message  # noqa: E402
from bessemer.inference.engine import Engine, EngineConfig  # noqa: E402
from bessemer.inference.sampling.params import SamplingParams  # noqa: E402
from bessemer.retrieval.summaries import ABOVE_QUOTES, ABOVE_TURNS, Measure, summarised  # noqa: E402

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/retrieval/summaries.py", "src/bessemer/retrieval/long_documents.py")

#: Tokens of the context in which conversations are summarised, of the whole ones, and of an answer.
CONTEXT, WHOLE, ANSWER = 768, 4096, 32
#: The message of the user in which it is said, from 0; what is said; what is asked at the end; what an answer holds.
CONVERSATIONS = (
    (0, "My train to Leipzig leaves at 14:52 on Friday.", "When does my train to Leipzig leave?", "14:52"),
    (0, "My daughter Mathilda is allergic to hazelnuts.", "What is my daughter allergic to?", "hazelnut"),
    (2, "We decided to paint the kitchen in olive green.", "Which colour did we choose for the kitchen?", "olive"),
    (2, "My locker at the swimming pool has the number 318.", "Which number does my locker have?", "318"),
    (0, "The plumber, Mr Okonkwo, comes on Tuesday.", "What is the plumber's name?", "okonkwo"),
    (0, "I can spend at most 240 euros on the new bicycle.", "How much can I spend on the bicycle?", "240"),
    (2, "My neighbour keeps the spare key in a blue flowerpot.", "Where does my neighbour keep the spare key?", "flowerpot"),
    (2, "Grandmother's recipe takes a pinch of cardamom.", "Which spice does Grandmother's recipe take?", "cardamom"),
    (0, "I am writing my thesis about lichens.", "What is my thesis about?", "lichen"),
    (2, "My old car, a Saab, broke down near Aarhus.", "Near which town did my car break down?", "aarhus"),
)
#: Talk of other things: what the user asks, and what the assistant answers.
TALK = (
    (
        "How do I keep basil alive on a window sill?",
        "Put the pot where it gets at least six hours of light, and water it from below when the soil feels dry. Pinch "
        "off the tips above a pair of leaves every week, so that the plant branches instead of flowering. Pots from a "
        "supermarket hold twenty seedlings that starve one another: divide the root ball into four, and give each quarter"
        " fresh soil. Cold draughts at night turn the leaves black, so move it away from the glass in winter.",
    ),
    (
        "Why does bread dough need to rest?",
        "While the dough rests, flour takes up water and the gluten forms long strands without being worked, which bakers"
        " call autolysis. Yeast eats sugars that enzymes free from starch, and the gas is caught between the strands. A "
        "longer rest in the refrigerator slows the yeast more than the bacteria, so that acids build up and the crumb "
        "tastes of more. If dough springs back while you roll it, ten minutes under a cloth let it relax.",
    ),
    (
        "What should I look at before I buy a used piano?",
        "Open the lid and look at the pins: rust on them or cracks in the wood between them mean that it will not stay in"
        " tune. Press every key slowly and listen for clicks, and play loud chords to hear whether strings buzz. Ask when"
        " it was last tuned, and at which pitch; one that stands a semitone low may lose strings when it is raised. "
        "Transport up a flight of stairs can cost as much as the instrument itself.",
    ),
    (
        "How do bees find their way home?",
        "Bees take the sun as a compass and allow for its course through the day, and where clouds hide it they read the "
        "polarisation of blue sky. On first flights they turn round and look at the hive from growing distances, and so "
        "learn landmarks. Distance they judge by how fast the ground streams past. Near the entrance the smell of the "
        "colony takes over, which is why hives that are moved by a few metres confuse their foragers.",
    ),
    (
        "What can I do against a squeaking door?",
        "Lift the door a little while you move it: where the squeak changes, a hinge is dry. Drive out one pin after the "
        "other, wipe off the old grease, and rub the pin with graphite or candle wax, which draw less dust than oil. If "
        "the frame creaks instead, the screws of the upper hinge are loose; longer ones that reach the stud behind it "
        "hold for years. Paint between leaf and frame squeaks in damp weather, and sanding helps.",
    ),
    (
        "How was concrete made in Roman times?",
        "Roman builders mixed lime with volcanic ash from around Naples and with lumps of broken stone. Sea water made "
        "the mixture in harbours stronger over the years, since crystals grew in its pores. Recent studies hold that "
        "quicklime was mixed in hot, which left white grains that heal cracks when rain dissolves them. The dome of the "
        "Pantheon uses lighter stone toward its top, down to pumice around the opening.",
    ),
    (
        "How do I read a weather map?",
        "Lines join places of equal pressure, and wind blows along them, faster where they lie close. In the northern "
        "hemisphere it goes counter-clockwise around a low. A line with triangles is a cold front: showers, then clear "
        "and gusty air. Half circles mark a warm front, whose rain begins hours before it arrives. Where both symbols "
        "share a line, the fronts have met, and the weather stays grey until the low fills up.",
    ),
    (
        "Which exercises help against a stiff neck?",
        "Sit upright and let one ear sink towards the shoulder until you feel a gentle pull, and hold it for five "
        "breaths. Then turn the chin to the collarbone and do the same. Draw the head straight back, as if making a "
        "double chin, ten times an hour at the desk. Shoulder blades that are pulled together and down take load from the"
        " muscles above. Warmth before and walking after help; numb fingers are a reason to see a doctor.",
    ),
    (
        "How does a lock on a canal work?",
        "A boat enters the chamber, and the gates close behind it. Sluices in the upper gates let water in until the "
        "levels are equal; only then can the upper gates be opened, as the pressure holds them shut before. Going down, "
        "sluices in the lower gates let the chamber run empty. Mitred gates, which point upstream, press together under "
        "the load and hardly leak. Each passage costs the upper reach a chamber of water.",
    ),
    (
        "What is the difference between jam and marmalade?",
        "Jam is cooked from whole or crushed fruit with sugar, and in Europe the word marmalade is kept for citrus fruit,"
        " whose peel gives the bitter taste and most of the pectin. Both set when sugar, acid and pectin are in balance "
        "at about 104 degrees. A drop on a cold plate that wrinkles when pushed is done. Too long a boil breaks pectin "
        "down again, and the jar stays runny however cool it gets.",
    ),
)


def conversation(place: int, said: str, question: str, seed: int) -> list[Message]:
    """A conversation in which something is said in passing, and asked for at the end. seed: with which talk it begins."""
    messages = []
    for number in range(len(TALK)):
        asks, answers = TALK[(number + seed) % len(TALK)]
        asks = f"{said} By the way: {asks[0].lower()}{asks[1:]}" if number == place else asks
        messages += [Message.user(asks), Message.assistant(answers)]
    return [*messages, Message.user(question)]


def with_summaries(engine: Engine, messages: Sequence[Message]) -> tuple[list[Message], str]:
    """A conversation within `CONTEXT`, and the summary in it, both as a server makes them (`serving/runtime/served.py`)."""
    tokenizer = engine.tokenizer

    def of_messages(messages: Sequence[Message]) -> int:
        inputs = [message.as_template_input() for message in messages]
        return len(tokenizer.apply_chat_template(inputs, add_generation_prompt=True))

    def of_text(text: str) -> int:
        return len(tokenizer.encode(text, add_bos=False))

    measure = Measure(of_messages, lambda message: of_messages([message]), of_text, CONTEXT - ANSWER, CONTEXT)
    steps = summarised(messages, measure)
    try:
        request = next(steps)
        while True:
            params = SamplingParams(max_tokens=request.most_tokens, temperature=0)
            request = steps.send(engine.chat([request.message.as_template_input()], params).text.strip())
    except StopIteration as stop:
        short: list[Message] = stop.value
    above, summary, *_ = next(message for message in short if message.role == "user").parts
    assert above.text == ABOVE_TURNS and of_messages(short) <= CONTEXT - ANSWER
    return short, summary.text


def answered(engine: Engine, messages: Sequence[Message]) -> str:
    params = SamplingParams(max_tokens=ANSWER, temperature=0)
    return engine.chat([message.as_template_input() for message in messages], params).text.strip()


def measured(model: Path, *, whole_too: bool) -> dict[str, Any]:
    """Of the conversations, how many kept what was said. whole_too: whether they are also answered without summaries."""
    rows = []
    with Engine(model, config=EngineConfig(max_model_len=WHOLE), device="cpu") as engine:
        for number, (place, said, question, key) in enumerate(CONVERSATIONS):
            whole = conversation(place, said, question, number)
            short, summary = with_summaries(engine, whole)
            texts = {"summary": summary.partition(ABOVE_QUOTES)[0], "with_quotes": summary, "answered": answered(engine, short)}
            if whole_too:
                texts["answered_from_all"] = answered(engine, whole)
            rows.append({"said": said, **texts, "keeps": {kind: key in text.lower() for kind, text in texts.items()}})
            print(rows[-1], flush=True)
    return {kind: sum(row["keeps"][kind] for row in rows) for kind in rows[0]["keeps"]} | {"conversations": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, help="NAME=MODEL; may be repeated")
    parser.add_argument("--whole", action="store_true", help="answer from the whole conversations too")
    arguments = parser.parse_args()
    models = dict(one.split("=", 1) for one in arguments.model)
    figures = {name: measured(Path(path), whole_too=arguments.whole) for name, path in models.items()}
    kinds = {
        "summary": "summary keeps it",
        "with_quotes": "with quotes",
        "answered": "answered",
        "answered_from_all": "from all",
    }
    shown = [kind for kind in kinds if all(kind in one for one in figures.values())]
    columns = [("model", ""), *((kinds[kind], "") for kind in shown)]
    rows = [(Path(models[name]).stem, *(one[kind] for kind in shown)) for name, one in figures.items()]
    print(recording.save("summaries", figures, tables={"models": recording.table(columns, rows)}))


if __name__ == "__main__":
    main()
