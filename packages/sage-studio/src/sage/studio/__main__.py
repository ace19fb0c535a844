"""`python -m sage.studio --gateway-url URL --port PORT`: serve the dashboard on the loopback address."""

import argparse
import os

from nicegui import ui

from sage.llm.client import AsyncSageClient
from sage.studio.page import EnginesPage


def main() -> None:
    """Serve the page until Ctrl-C. The API key of the gateway is read from SAGE_API_KEY."""
    parser = argparse.ArgumentParser(prog="python -m sage.studio", description="The SAGE dashboard.")
    parser.add_argument("--gateway-url", default="http://127.0.0.1:8889")
    parser.add_argument("--port", type=int, default=8890)
    arguments = parser.parse_args()
    client = AsyncSageClient(arguments.gateway_url, os.environ.get("SAGE_API_KEY"))

    @ui.page("/")
    def engines() -> None:
        EnginesPage(client)

    ui.run(host="127.0.0.1", port=arguments.port, title="SAGE", reload=False, show=False, show_welcome_message=False)


if __name__ == "__main__":
    main()
