"""Try the model in a browser: see its guesses for a masked word and the tokens it attended to, or search by meaning.

    python examples/app/app.py
    python examples/app/app.py --model my-lsg-albert --embedder my-lsg-embedder --port 8000

Needs gradio (`pip install ".[app]"`). Only this machine can open the page, and no data leaves it, unless you give
--host or --share.
"""

import argparse
import importlib.util
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from guess import load
from search import load_embedder

ROOT = Path(__file__).resolve().parent.parent.parent
MAX_FILE_SIZE = "5mb"
PORTS = range(7860, 7960)  # without --port, the first free one is taken


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT), help="directory or Hub id (default: this repository)")
    parser.add_argument(
        "--embedder", help="directory or Hub id of a sentence-transformers model for the search (default: none)"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    parser.add_argument("--share", action="store_true", help="let gradio create a public address for the page")
    args = parser.parse_args(argv)
    if args.port is not None and not 1 <= args.port <= 65535:
        parser.error(f"--port must be from 1 to 65535, got {args.port}")
    return args


def free_port(host: str, ports: Iterable[int]) -> int:
    """The first of some ports on which this machine can listen at an address.

    Raises:
        OSError: there is no such port.
    """
    for port in ports:
        try:
            with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
                return port
        except OSError as error:
            failure = error
    raise OSError(f"port {port}: {failure.strerror}")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    needed = {"gradio": '".[app]"'} | ({"sentence_transformers": "sentence-transformers"} if args.embedder else {})
    for module, requirement in needed.items():
        if importlib.util.find_spec(module) is None:
            print(f"app: {module} is not installed: pip install {requirement}", file=sys.stderr)
            return 1
    try:
        port = free_port(args.host, PORTS if args.port is None else [args.port])
    except OSError as error:
        print(f"app: cannot listen on {args.host}: {error}", file=sys.stderr)
        return 1
    option = "--model"
    try:
        model, tokenizer = load(args.model)
        option = "--embedder"
        embedder = load_embedder(args.embedder) if args.embedder else None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        print(f"app: cannot load {option} {getattr(args, option[2:])}: {reason}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a terminated app removes its uploads, too
    with tempfile.TemporaryDirectory(prefix="lsg_albert_app_") as uploads:
        # gradio reads these when it is imported, and later.
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=uploads)
        from page import THEME, build

        # Every option is set here, so that no variable of gradio opens the page to others. No history is kept.
        blocks = build(model, tokenizer, embedder)
        _, url, public_url = blocks.launch(
            server_name=args.host, server_port=port, share=args.share, max_file_size=MAX_FILE_SIZE,
            run_history=False, ssr_mode=False, mcp_server=False, theme=THEME, footer_links=[], quiet=True,
            prevent_thread_lock=True,
        )  # fmt: skip
        print(f"Open {public_url or url} in a browser; Ctrl+C stops the app.", flush=True)
        blocks.block_thread()
    return 0


if __name__ == "__main__":
    sys.exit(main())
