"""Starting and ending Gradio's server, without anything that contacts other machines."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from audioldm2.extras import import_extra
from audioldm2.web.studio import Studio

# Gradio and huggingface_hub read these when they are imported.
ENVIRONMENT = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
# Of the visitor's system; Gradio's own come from Google.
FONTS, FIXED_FONTS = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]


def check_port(host: str, port: int) -> None:
    """Check that a server can listen, before anything is loaded.

    Raises:
        OSError: the port is in use or not allowed, or the host is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise OSError(
                f"cannot listen on {host}, port {port} ({reason}); choose another --port"
            ) from error


def prepare(host: str) -> None:
    """Switch telemetry off, before Gradio is imported, and exempt this machine from proxies.

    Args:
        host: the address that the server will listen on.
    """
    os.environ.update(ENVIRONMENT)
    # Gradio asks itself whether it runs.
    exempt = [os.environ.get("NO_PROXY", ""), "localhost", host]
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(filter(None, exempt))


@contextmanager
def serving(studio: Studio, host: str, port: int) -> Iterator[str]:
    """Serve the page while the block runs.

    Args:
        studio: generates.
        host: the address to listen on.
        port: its port.

    Yields:
        The page's address.

    Raises:
        ImportError: gradio is not installed or is broken.
        OSError: the server cannot listen.
    """
    prepare(host)
    with tempfile.TemporaryDirectory(prefix="audioldm2-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        gr = import_extra("gradio", "web", "the web page")
        from audioldm2.web.page import CSS, build_page

        page = build_page(studio, Path(folder))
        try:
            page.launch(
                server_name=f"[{host}]" if ":" in host else host,
                server_port=port,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                inbrowser=False,
                show_error=False,
                footer_links=["api"],
                max_file_size=studio.limits.upload,
                enable_monitoring=False,
                ssr_mode=False,
                mcp_server=False,
                pwa=False,
                theme=gr.themes.Default(font=FONTS, font_mono=FIXED_FONTS),
                css=CSS,
            )
            yield page.local_url
        finally:
            studio.close()
            page.close(verbose=False)
