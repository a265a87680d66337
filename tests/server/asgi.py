"""The client's side of ASGI, for applications that are called without a server."""

from __future__ import annotations

import asyncio

from starlette.types import Message


class Client:
    """Sends messages, then disconnects when told to."""

    def __init__(self, *messages: Message) -> None:
        self.messages = list(messages)
        self.gone = asyncio.Event()
        self.received: list[Message] = []

    async def receive(self) -> Message:
        if self.messages:
            return self.messages.pop(0)
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.received.append(message)


def chunk(body: bytes, more: bool = False) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}
