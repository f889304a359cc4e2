"""Instruments of proof: histories, the checker that judges them, faults, and simulation.

Importable by anybody who tests a broker, a store or an application. Nothing that runs in
production imports this room.
"""
