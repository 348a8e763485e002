from typing import final

@final
class Walk:
    def __new__(cls, path: bytes, dir_fd: int, follows: bool) -> Walk: ...
