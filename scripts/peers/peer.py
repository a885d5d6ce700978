"""What all peers share: how `heed bench … --against PEER` talks to them.

heed starts a script, writes one JSON object a line to its standard input (raw tensors may follow) and reads one JSON
object a line back. The first is the setup, answered with the peer's version; each one after it is a run, answered with
its seconds. The script ends when its input does. A package that is not installed is answered with {"missing": name}, a
failure with {"error": line}.
"""
import json
import math
import os
import sys


class Channel:
    def __init__(self):
        self.input = sys.stdin.buffer
        self.output = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print must not stand between the answers

    def request(self):
        line = self.input.readline()
        return json.loads(line) if line else None

    def answer(self, answer):
        self.output.write(json.dumps(answer) + "\n")
        self.output.flush()

    def read(self, count):
        """`count` raw bytes, which may be changed."""
        data = bytearray(count)
        view, at = memoryview(data), 0
        while at < count:
            got = self.input.readinto(view[at:])
            if not got:
                raise EOFError("the tensors ended early")
            at += got
        return data

    def tensor(self, torch, shape, dtype):
        size = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
        return torch.frombuffer(self.read(size), dtype=dtype).reshape(shape)


def serve(open_peer):
    """open_peer(setup, channel) gives an object with `version` (text) and run(request) -> answer."""
    channel = Channel()
    try:
        setup = channel.request()
        if setup is None:
            return
        peer = open_peer(setup, channel)
        channel.answer({"version": peer.version})
        while (request := channel.request()) is not None:
            channel.answer(peer.run(request))
    except ModuleNotFoundError as error:
        channel.answer({"missing": error.name})
    except KeyboardInterrupt:
        pass
    except Exception as error:  # whatever a library raises becomes one line
        channel.answer({"error": " ".join(f"{type(error).__name__}: {error}".split())[:400]})
