"""The one fake: a Grid whose nodes are functions."""

from types import SimpleNamespace

from flwr.app import Message, Metadata
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.node_pb2 import Node, NodeInfo
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from common.folding import folded, unfold


class FakeGrid(Grid):
    """Answers each message by `answer(node, message)`; None is silence."""

    def __init__(self, names, answer):
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.names, self.answer = names, answer
        self.pushed, self.handled = {}, set()
        self.unsolicited = []

    def set_run(self, run):
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        raise NotImplementedError

    def get_node_ids(self):
        return list(self.names)

    def get_nodes(self):
        return [NodeInfo(node_id=node, name=name) for node, name in self.names.items()]

    def push_messages(self, messages):
        ids = []
        for message in messages:
            known = message.metadata
            identity = f"m-{len(self.pushed) + 1}"
            metadata = Metadata(
                known.run_id,
                identity,
                known.src_node_id,
                known.dst_node_id,
                "",
                known.group_id,
                known.created_at,
                known.ttl,
                known.message_type,
            )
            self.pushed[identity] = Message(content=message.content, metadata=metadata)
            ids.append(identity)
        return ids

    def pull_messages(self, message_ids):
        replies = list(self.unsolicited)
        for identity in message_ids:
            if identity not in self.handled:
                self.handled.add(identity)
                message = self.pushed[identity]
                replies.append(self.answer(message.metadata.dst_node_id, message))
        return [reply for reply in replies if reply is not None]

    def send_and_receive(self, messages, *, timeout=None):
        raise NotImplementedError


class Line:
    """The SuperLink's side of a line: replies in parts, as Flower keeps them."""

    def __init__(self, before_a_pull=lambda _: None):
        self.before_a_pull = before_a_pull
        self.parts, self.replies, self.asked = {}, [], []
        self.not_yet, self.confirmed, self.fault = {}, [], None
        self.replies_to_all = False
        """Whether it gives out what was not asked for, as Flower's does for what it is sent."""

    @property
    def client(self):
        """By the names of Flower's client."""
        return SimpleNamespace(
            PullMessages=self.pull_messages,
            PullObject=self.pull_object,
            ConfirmMessageReceived=self.confirm,
        )

    def holds(self, reply, *, answers, garbled=None):
        """A reply to the message `answers`; `garbled` alters one of its parts."""
        name = reply.object_id
        reply.metadata.__dict__["_message_id"] = name
        with no_object_id_recompute():
            tree = get_object_tree(reply)
            parts = {n: each.deflate() for n, each in get_all_nested_objects(reply).items()}
        self.parts |= garbled(parts, name) if garbled else parts
        envelope = message_to_proto(remove_content_from_message(reply))
        envelope.metadata.reply_to_message_id = answers
        self.replies.append((envelope, tree))
        return name

    def pull_messages(self, request):
        if self.fault:
            raise self.fault
        self.before_a_pull(request)
        self.asked.append([*request.message_ids])
        found = [
            pair
            for pair in self.replies
            if self.replies_to_all or pair[0].metadata.reply_to_message_id in self.asked[-1]
        ]
        self.replies = [pair for pair in self.replies if pair not in found]
        return PullAppMessagesResponse(
            messages_list=[each for each, _ in found],
            message_object_trees=[tree for _, tree in found],
        )

    def pull_object(self, request):
        name = request.object_id
        if self.not_yet.get(name, 0):
            self.not_yet[name] -= 1
            return PullObjectResponse(object_found=True, object_available=False)
        found = name in self.parts
        return PullObjectResponse(
            object_found=found, object_available=found, object_content=self.parts.get(name, b"")
        )

    def confirm(self, request):
        self.confirmed.append(request.message_object_id)


class OverLine(FakeGrid):
    """As Flower's grid over a network is built, between nodes that fold as ours do."""

    node = Node(node_id=1)
    run = Run.create_empty(1)

    def __init__(self, names, answer):
        super().__init__(names, answer)
        self._line = Line(before_a_pull=self._answer)
        self._runtime_client = self._line.client

    def _answer(self, request):
        for message in self.pushed.values():
            unfold(message)
        for reply in self.pull_messages(request.message_ids):
            asked = reply.metadata.reply_to_message_id
            if reply.has_content():
                reply.content = folded(reply.content)
            self._line.holds(reply, answers=asked)
