from .component import doctor as doctor
