"""The ground of every server that the tests talk to: HTTP on a free port of the loopback interface, in a thread of its own.

A server derives from LocalServer what it holds, and from Answers what it says. `with` starts and stops it. The faults
that every wire can have are methods of Answers: a body cut short, a closed connection, an answer that is late or never comes.
"""

import socket
import struct
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class LocalServer(ThreadingHTTPServer):
    """A server at `url` from `with` on. `stopping` is set when it ends, so that no answer that waits holds the test up."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, answers):
        super().__init__(("127.0.0.1", 0), answers)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.stopping = threading.Event()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """Print the traceback of a mistake in the answers. A client that hangs up is no mistake, and is not printed."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class Answers(BaseHTTPRequestHandler):
    """The answers to one connection. cut: the bytes of the next body after which the connection is closed, or None."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True                           # else each body waits 40 ms for the headers to be acknowledged
    cut = None

    def reply(self, status, body=b"", **headers):
        """Answer, and return True. Headers are written as Content_Type="text/html"; one that is None is left out."""
        self.send_response(status)
        for name, value in {"Content_Length": len(body), **headers}.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:self.cut])
        if self.cut is not None:
            self.close_connection = True
        return True

    def write(self, content):
        """Send bytes as they are; False when the client is gone."""
        try:
            self.wfile.write(content)
            self.wfile.flush()
        except OSError:
            return False
        return True

    def hang_up(self, reset=False):
        """Close the connection without an answer. reset: the client sees it broken, and not ended."""
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RD if reset else socket.SHUT_RDWR)
        self.connection.close()
        return True

    def pause(self, seconds):
        """Wait, at most until the server stops; True if it does."""
        return self.server.stopping.wait(seconds)

    def hang(self):
        """Take the request and never answer."""
        self.pause(30)
        self.close_connection = True
        return True

    def log_message(self, *_):
        """Print nothing: the tests compare what the commands print."""
