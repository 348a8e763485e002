"""The table of numbers in use, in both of its forms: compiled and interpreted."""

import errno
import importlib.util
import os
import pathlib
import random
import stat
from types import SimpleNamespace

import pytest

from greenaio._core import handle as _handle
from greenaio._core.bell import _handlers


@pytest.fixture(params=['compiled', 'interpreted'])
def handles(request, monkeypatch):
    if request.param == 'compiled':
        yield _handle
        return
    source = pathlib.Path(_handle.__file__).with_name('handle.py')
    spec = importlib.util.spec_from_file_location('greenaio._interpreted', source)
    module = importlib.util.module_from_spec(spec)
    before = len(_handlers)
    spec.loader.exec_module(module)
    yield module
    del _handlers[before:]


@pytest.fixture
def number():
    fd = os.open(os.devnull, os.O_RDONLY)
    yield fd
    if is_open(fd):
        os.close(fd)


def is_open(fd):
    try:
        os.fstat(fd)
    except OSError as error:
        assert error.errno == errno.EBADF
        return False
    return True


def close(handle):
    handle.close_number()


def test_number_that_nothing_uses_has_no_handle(handles, number):
    handle = handles.take(number)
    assert handles.handle_of(number) is handle and handles.in_use(number)
    assert handles.take(number) is handle and handle.users == 2
    handle.let_go()
    handle.let_go()
    assert handles.handle_of(number) is None and not handles.in_use(number)
    assert is_open(number)
    handles._check()


def test_last_user_closes_a_number_that_is_being_closed(handles, number):
    with handles.using(number), handles.using(number):
        handles.handle_of(number).close_with(close)
        assert is_open(number)
        with pytest.raises(OSError) as caught:
            handles.check_open(number)
        assert caught.value.errno == errno.EBADF
        with pytest.raises(OSError), handles.using(number):
            pass
        handles.take(number).let_go()       # the next step of what began before
        handles._check()
    assert not is_open(number) and handles.handle_of(number) is None
    handles.check_open(number)
    handles._check()


def test_number_whose_close_is_under_way_is_taken_by_no_operation(handles, number):
    handle = handles.take(number)
    under_way = []
    handle.close_with(lambda one: under_way.append(one.again()))
    handle.let_go()
    assert under_way == [handle] and is_open(number)
    with pytest.raises(OSError) as caught:
        handles.take(number)
    assert caught.value.errno == errno.EBADF
    handles._check()
    handle.close_with(close)
    handle.let_go()
    assert not is_open(number)
    handles._check()


@pytest.mark.parametrize('fd', [1 << 20, 2 ** 31 - 1])
def test_number_that_is_not_open_takes_no_room(handles, fd):
    handle = handles.take(fd)
    assert handles.handle_of(fd) is None and handle.users == 1
    handle.let_go()
    handles._check()


@pytest.mark.parametrize('fd', [-1, -2 ** 31])
def test_negative_number_is_ebadf(handles, fd):
    for call in (handles.take, handles.check_open):
        with pytest.raises(OSError) as caught:
            call(fd)
        assert caught.value.errno == errno.EBADF
    assert handles.handle_of(fd) is None and not handles.in_use(fd)


def test_a_close_by_the_parent_is_over_in_its_child(handles, number):
    handle = handles.take(number)
    handle.close_with(close)
    other = os.open(os.devnull, os.O_RDONLY)
    user = handles.take(other)
    handles._after_fork_in_child()
    assert not is_open(number) and is_open(other)
    assert handles.all_handles() == [] and not handles.in_use(other)
    again = os.open(os.devnull, os.O_RDONLY)
    assert again == number
    handle.let_go()
    user.let_go()
    handle.close_number()
    assert is_open(again) and is_open(other)
    handles._check()
    os.close(again)
    os.close(other)


def test_idle_number_is_not_inherited_as_one_in_use(handles, number):
    handles.inherited.pop(number, None)
    handles.take(number).let_go()
    handles._after_fork_in_child()
    assert number not in handles.inherited and is_open(number)


def test_any_order_of_uses_and_closes_ends_with_all_numbers_closed_once(handles):
    chance = random.Random(17)
    for _ in range(50):
        numbers = [os.open(os.devnull, os.O_RDONLY) for _ in range(4)]
        users = []
        closed = set()
        for _ in range(60):
            fd = chance.choice(numbers)
            if users and chance.random() < 0.5:
                users.pop(chance.randrange(len(users))).let_go()
            elif chance.random() < 0.8:
                if fd not in closed:
                    users.append(handles.take(fd))
            elif fd not in closed:
                closed.add(fd)
                with handles.using(fd) as handle:
                    handle.close_with(close)
            assert is_open(fd) == (fd not in closed or any(user.fd == fd for user in users))
            handles._check()
        while users:
            users.pop().let_go()
        for fd in numbers:
            assert is_open(fd) == (fd not in closed)
            if fd not in closed:
                os.close(fd)
        assert handles.all_handles() == []


# Inodes ------------------------------------------------------------------------------------------

def test_inode_is_one_object_for_as_long_as_anything_refers_to_it(handles):
    one = handles.inode_of(5, 7)
    one.demoted_until = 1
    assert handles.inode_of(5, 7) is one and handles.inode_if_any(5, 7) is one
    assert handles.inode_of(5, 8) is not one is not handles.inode_of(6, 7)
    assert handles.inode_if_any(5, 8) is handles.inode_if_any(6, 7) is None
    assert one in handles.all_inodes()
    del one
    assert handles.inode_if_any(5, 7) is None
    handles._check()
    assert handles.inode_of(5, 7).demoted_until == 0


def test_nodes_of_a_block_device_are_one_inode(handles):
    def told(**facts):
        return SimpleNamespace(**{'st_mode': stat.S_IFREG, 'st_dev': 5, 'st_ino': 7, 'st_rdev': 0, **facts})

    file, disk = handles.inode_of(5, 7), handles.inode_of(9, 0)
    assert handles.inode_of_facts(told()) is file
    for number in 7, 8:
        assert handles.inode_of_facts(told(st_mode=stat.S_IFBLK, st_rdev=9, st_ino=number)) is disk
    assert handles.inode_of_facts(told(st_ino=8)) is None
