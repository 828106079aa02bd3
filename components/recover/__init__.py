from .component import recover as recover
