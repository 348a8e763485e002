from greenaio._core.engine import Engine
from greenaio._core.mailbox import Inbox

BEGIN_MAX: float

def leave(engine: Engine, inbox: Inbox) -> None: ...
