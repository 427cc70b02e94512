// Whether a step finds everything as the step before has left it: one call for all parameters, where Python needs one
// per parameter and question. With bindings.cpp, the only file that knows Python.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <string_view>

#include "dlpack.h"

namespace gmp {

namespace py = pybind11;

// What was found when the parameters were checked. Python owns it, so that its garbage collector sees it.
struct Checked {
  py::list parameters;  // in the order of their groups
  py::list types;       // of the parameters
  py::list groups;      // index of the group of each
  py::list state;       // keys and values of the optimizer's state, and the values of those that are dictionaries
  py::list masks, bits;
  py::list frozen, versions;  // bits that must not have been written, and how often they had been
  py::bytes layouts, places;  // descriptions of the parameters without and with their addresses
};

inline Checked checked_of(const py::tuple& given) {
  if (given.size() != 10) throw std::invalid_argument("expected all that was found when the parameters were checked");
  return {given[0], given[1], given[2], given[3], given[4], given[5], given[6], given[7], given[8], given[9]};
}

// Drops the error that a question to an object has raised; an interrupt is passed on.
inline void drop_error() {
  if (PyErr_Occurred() != nullptr && !PyErr_ExceptionMatches(PyExc_Exception)) throw py::error_already_set();
  PyErr_Clear();
}

// Walks a list of what is expected beside what there is.
class Expected {
 public:
  explicit Expected(const py::list& objects) : objects_(objects) {}
  bool is_next(const PyObject* object) {
    return next_ < PyList_GET_SIZE(objects_.ptr()) && PyList_GET_ITEM(objects_.ptr(), next_++) == object;
  }
  bool is_at_end() const { return next_ == PyList_GET_SIZE(objects_.ptr()); }

 private:
  const py::list& objects_;
  Py_ssize_t next_ = 0;
};

inline py::object attribute_of(PyObject* object, PyObject* name) {
  return py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name));
}

// Calls a function of a key and a value for each entry; returns whether it has returned true for all.
template <typename IsRight>
bool all_entries(PyObject* dict, const IsRight& is_right) {
  PyObject *key = nullptr, *value = nullptr;
  for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value) != 0;) {
    if (!is_right(key, value)) return false;
  }
  return true;
}

inline bool holds_state(const py::object& state, const Checked& checked) {
  if (!PyDict_Check(state.ptr())) return false;
  Expected expected(checked.state);
  const auto is_entry = [&](PyObject*, PyObject* value) { return expected.is_next(value); };
  return all_entries(state.ptr(), [&](PyObject* key, PyObject*) { return expected.is_next(key); }) &&
         all_entries(state.ptr(), is_entry) &&
         all_entries(
             state.ptr(),
             [&](PyObject*, PyObject* value) { return !PyDict_Check(value) || all_entries(value, is_entry); }) &&
         expected.is_at_end();
}

inline bool holds_masks(const Checked& checked) {
  static PyObject* const packed = PyUnicode_InternFromString("packed");
  static PyObject* const version = PyUnicode_InternFromString("_version");
  Expected bits(checked.bits);
  for (const py::handle mask : checked.masks) {
    if (!bits.is_next(attribute_of(mask.ptr(), packed).ptr())) return false;
  }
  for (size_t i = 0; i < checked.frozen.size(); ++i) {
    // Inference tensors do not count their versions.
    const py::object now = attribute_of(checked.frozen[i].ptr(), version);
    if (!now) drop_error();
    if ((now ? PyLong_AsLongLong(now.ptr()) : 0) != PyLong_AsLongLong(checked.versions[i].ptr())) return false;
  }
  return true;
}

// Adds the description of a tensor whose memory holds its values themselves; returns whether it is one. A view that
// negates its memory does not, but nobody negates bits.
inline bool describe_plain(const dlpack::Exchange& table, PyObject* object, bool with_address, std::string& bytes) {
  static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  dlpack::Tensor tensor{};
  if (!dlpack::look_at(table, object, tensor)) return false;
  dlpack::describe(tensor, with_address, bytes);
  if (!dlpack::dtype_of(tensor)) return true;
  return py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(object, is_neg)).ptr() == Py_False;
}

// Adds the size of a tensor's storage, which may have been cut at the same address; returns whether it has one.
inline bool describe_storage(PyObject* tensor, std::string& bytes) {
  static PyObject* const untyped_storage = PyUnicode_InternFromString("untyped_storage");
  static PyObject* const nbytes = PyUnicode_InternFromString("nbytes");
  const auto storage = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, untyped_storage));
  if (!storage) return false;
  const auto size = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(storage.ptr(), nbytes));
  const long long value = size ? PyLong_AsLongLong(size.ptr()) : -1;
  bytes.append(reinterpret_cast<const char*>(&value), sizeof(value));
  return value >= 0;
}

// Adds the gradients of the parameters to a list, in their order. Returns whether each has one, and no other parameter.
inline bool add_gradients(const py::object& groups, const Checked& checked, py::list& gradients) {
  if (!PyList_Check(groups.ptr())) return false;
  static PyObject* const params = PyUnicode_InternFromString("params");
  static PyObject* const grad = PyUnicode_InternFromString("grad");
  Expected parameters(checked.parameters), types(checked.types);
  size_t next = 0;
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups.ptr()); ++g) {
    const auto group = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(groups.ptr(), g));
    PyObject* const own = PyDict_Check(group.ptr()) ? PyDict_GetItemWithError(group.ptr(), params) : nullptr;
    if (own == nullptr || !PyList_Check(own)) return false;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(own); ++i) {
      const auto parameter = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(own, i));
      const py::object gradient = attribute_of(parameter.ptr(), grad);
      if (!gradient) return false;
      if (gradient.is_none() && !(next < checked.parameters.size() && parameter.is(checked.parameters[next]))) continue;
      const auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(parameter.ptr()));
      if (gradient.is_none() || !parameters.is_next(parameter.ptr()) || !types.is_next(type) ||
          PyLong_AsSsize_t(py::object(checked.groups[next++]).ptr()) != g) {
        return false;
      }
      gradients.append(gradient);
    }
  }
  return parameters.is_at_end();
}

// Whether these are the settings of parameter groups, which have their parameters besides. Learning rates may be other
// numbers.
inline bool has_settings(const py::object& groups, const py::list& settings) {
  static PyObject* const lr = PyUnicode_InternFromString("lr");
  if (!PyList_Check(groups.ptr()) || PyList_GET_SIZE(groups.ptr()) != PyList_GET_SIZE(settings.ptr())) return false;
  for (size_t g = 0; g < settings.size(); ++g) {
    const auto group = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(groups.ptr(), static_cast<Py_ssize_t>(g)));
    const py::object own = settings[g];
    if (!PyDict_Check(group.ptr()) || PyDict_Size(group.ptr()) != PyDict_Size(own.ptr()) + 1) return false;
    const auto is_in_group = [&](PyObject* key, PyObject* value) {
      PyObject* const now = PyDict_GetItem(group.ptr(), key);
      return now == value || (key == lr && now != nullptr && PyFloat_CheckExact(now) && PyFloat_CheckExact(value));
    };
    if (!all_entries(own.ptr(), is_in_group)) return false;
  }
  return true;
}

// Returns the gradients of all parameters, in their order, if each has one beside which a kernel can walk it, no other
// parameter of the groups has one, and nothing that the checks depend on has changed; else None.
inline py::object gradients_if_unchanged(const py::capsule& exchange, const py::tuple& expected,
                                         const py::object& groups, const py::object& state) {
  const Checked checked = checked_of(expected);
  const auto* const table = dlpack::understood(exchange.get_pointer<dlpack::Exchange>());
  py::list gradients;
  const auto are_described = [&](const py::list& tensors, bool with_addresses, const py::bytes& expected) {
    const std::string_view wanted = expected;
    std::string found;
    found.reserve(wanted.size());
    for (const py::handle tensor : tensors) {
      if (!describe_plain(*table, tensor.ptr(), with_addresses, found)) return false;
    }
    return found == wanted;
  };
  if (table != nullptr && add_gradients(groups, checked, gradients) && holds_state(state, checked) &&
      holds_masks(checked) && are_described(checked.parameters, true, checked.places) &&
      are_described(gradients, false, checked.layouts)) {
    return gradients;
  }
  drop_error();
  return py::none();
}

}  // namespace gmp
