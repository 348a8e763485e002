from greenaio._core.dispatch import Dispatcher
from greenaio._core.uninterrupted import REFUSED as REFUSED
from greenaio._core.uninterrupted import inside as inside

class Parking(Dispatcher):
    @property
    def waiting(self) -> int: ...
    @property
    def forks(self) -> int: ...
