import pytest


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These networks are too small to share: two threads would mostly wait for one another on a busy machine."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
