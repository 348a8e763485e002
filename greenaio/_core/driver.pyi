from greenaio._core.parking import Parking
from greenaio._core.request import Request

class Driver(Parking):
    def perform_request(self, request: Request) -> int: ...
