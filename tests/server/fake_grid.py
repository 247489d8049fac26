"""The one fake: a Grid whose nodes are functions."""

from flwr.app import Message, Metadata
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity


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
