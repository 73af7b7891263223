"""Clients of a server in processes of their own, in which an answer ends only by a signal: run as a script.

    python raw_clients.py HOST PORT COUNT FIELDS

Each asks /v1/chat/completions, every other one for a stream, prints a line once it has, and reads what comes.
"""

import json
import os
import signal
import socket
import sys

HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{}"


def ask(host: str, port: str, body: str) -> None:
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(HEAD.format(len(body), body).encode())
        os.write(1, b"asked\n")
        while connection.recv(1 << 16):
            pass
    signal.pause()


if __name__ == "__main__":
    host, port, count, fields = sys.argv[1:]
    for place in range(int(count)):
        if os.fork() == 0:
            ask(host, port, json.dumps(json.loads(fields) | {"stream": place % 2 == 0}))
    signal.pause()
