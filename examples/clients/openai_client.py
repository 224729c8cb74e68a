"""Chat with Drift through smg's OpenAI-compatible HTTP: pip install smg openai.

drift serve --compat vllm
smg launch --backend vllm --worker-urls grpc://127.0.0.1:50051 --host 127.0.0.1 --port 30000
python openai_client.py http://127.0.0.1:30000/v1 "Tell me of a river." [--tokens 40] [--complete]
"""

from __future__ import annotations

import argparse

import openai


def main() -> None:
    """Print the answer as it comes, or (--complete) in one piece."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base_url")
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--complete", action="store_true")
    given = parser.parse_args()
    client = openai.OpenAI(base_url=given.base_url, api_key="none", timeout=60)
    (model, *_) = [model.id for model in client.models.list()]
    asked = {
        "model": model,
        "messages": [{"role": "user", "content": given.prompt}],
        "max_completion_tokens": given.tokens,
        "temperature": 0,
    }
    if given.complete:
        print(client.chat.completions.create(**asked).choices[0].message.content)
        return
    for chunk in client.chat.completions.create(**asked, stream=True):
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
