from tests import deprecations

deprecations.listen()  # before conftest.py, whose import of this project is a call of other packages as well
