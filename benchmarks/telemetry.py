"""Clocks, power and temperature of the first GPU while something is measured, as `nvidia-smi` tells them."""

import shutil
import statistics
import subprocess
import tempfile

QUERY = {
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_w": "power.draw",
    "temperature_c": "temperature.gpu",
    "utilization_percent": "utilization.gpu",
}


class Telemetry:
    """A log from now on, every half second; without `nvidia-smi` there is none."""

    def __init__(self) -> None:
        self._process = None
        if program := shutil.which("nvidia-smi"):
            self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (read when the process has ended)
            fields = ",".join(QUERY.values())
            words = [f"--query-gpu={fields}", "--format=csv,noheader,nounits", "--loop-ms=500", "--id=0"]
            self._process = subprocess.Popen([program, *words], stdout=self._log, stderr=subprocess.DEVNULL)

    def stop(self) -> dict[str, dict[str, float]]:
        """{what: {"q10", "median", "q90"}} over all samples, without what the GPU does not tell."""
        if self._process is None:
            return {}
        self._process.terminate()
        self._process.wait()
        self._log.seek(0)
        rows = [line.split(", ") for line in self._log.read().splitlines()]
        columns = zip(*(row for row in rows if len(row) == len(QUERY)), strict=True)
        known = {name: _numbers(column) for name, column in zip(QUERY, columns, strict=False)}
        return {name: _quantiles(numbers) for name, numbers in known.items() if len(numbers) > 1}


def _numbers(cells: tuple[str, ...]) -> list[float]:
    return [float(cell) for cell in cells if cell.replace(".", "", 1).isdigit()]


def _quantiles(numbers: list[float]) -> dict[str, float]:
    tenths = statistics.quantiles(numbers, n=10, method="inclusive")
    return {"q10": round(tenths[0], 1), "median": round(tenths[4], 1), "q90": round(tenths[8], 1)}
