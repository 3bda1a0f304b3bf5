"""Quantise a model to 8 bits and talk with it through OpenAI's API: `python quantise_and_serve.py [MODEL]`, a model's folder;
without one, what `tiny_model.py` made.

Needs the extra serve. OpenAI's client is a package of its own: `pip install openai`.
"""

import subprocess
import sys
import threading
from pathlib import Path

import openai

from bessemer import Engine
from bessemer.serving.config import ServingConfig
from bessemer.serving.server import address_of, create_server, listen

model = sys.argv[1] if len(sys.argv) > 1 else "runs/tiny/model"
if not Path("small").exists():
    subprocess.run([sys.executable, "-m", "bessemer", "quantize", model, "small", "--scheme", "int8"], check=True)

with Engine("small") as engine:
    listener = listen("127.0.0.1", 0)  # 0: any free port
    server = create_server(engine, "small", ServingConfig())
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        with openai.OpenAI(base_url=f"{address_of(listener)}/v1", api_key="any") as client:
            answer = client.completions.create(model="small", prompt="The name of", max_tokens=12, temperature=0)
            print(answer.choices[0].text)
    finally:
        server.should_exit = True
        thread.join()
