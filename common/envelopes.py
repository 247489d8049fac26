"""Envelopes: messages like one that Flower has made, each with its own content and address.

`flwr.app.Message` checks a dozen arguments each time, and all but two of them are the same for
every site of a round: 24 us a site and round, where training a small one takes 300.
"""

from flwr.app import Message, Metadata, RecordDict


class Envelopes:
    """Makes the instructions to many nodes, or the replies of many nodes to one instruction.

    Guarantee: a message is what `Message` makes of the same content and address, but for the time
    of its making: that of the first one like it, as they are made right after each other.
    """

    def __init__(self) -> None:
        self._model: Metadata | None = None
        """Of the first one; what it carried is not kept."""
        self._of: tuple[object, ...] = ()

    def instruction(
        self, content: RecordDict, node: int, kind: str, *, ttl: float, group: str
    ) -> Message:
        """What `node` is asked: as `Message(content, node, kind, ttl=ttl, group_id=group)`.

        Args: ttl: seconds, of the first; those like it have until the same moment.
        """
        if self._model is None or self._of != (kind, group):
            return self._first(Message(content, node, kind, ttl=ttl, group_id=group), (kind, group))
        return _like(self._model, content, {"_dst_node_id": node})

    def reply(self, content: RecordDict, to: Message) -> Message:
        """What is answered: as `Message(content, reply_to=to)`."""
        asked = to.metadata
        of = (
            *(asked.run_id, asked.src_node_id, asked.group_id, asked.message_type),
            *(asked.created_at, asked.ttl, asked.src_task_id, asked.dst_task_id),
        )
        if self._model is None or self._of != of:
            return self._first(Message(content, reply_to=to), of)
        own = {"_src_node_id": asked.dst_node_id, "_reply_to_message_id": asked.message_id}
        return _like(self._model, content, own)

    def _first(self, message: Message, of: tuple[object, ...]) -> Message:
        self._model, self._of = _copy(message.metadata), of
        return message


def _like(model: Metadata, content: RecordDict, own: dict[str, object]) -> Message:
    made, metadata = Message.__new__(Message), _copy(model)
    metadata.__dict__.update(own)
    made.__dict__.update(_metadata=metadata, _content=content, _error=None)
    return made


def _copy(metadata: Metadata) -> Metadata:
    made = Metadata.__new__(Metadata)
    made.__dict__.update(metadata.__dict__)
    return made
