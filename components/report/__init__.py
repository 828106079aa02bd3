from .component import report as report
